"""Planted faults in what measures, collects, scores and reports: each must fail its named test.

    python tests/mutants.py              # all; `make mutants`
    python tests/mutants.py intervals    # those whose file, text or test has the word

A fault replaces a piece of one file, which must stand there once. It is planted in a copy of the
tree, never in the tree itself; its test runs alone, and must fail. A test that passes guards
nothing. Where code is rewritten, mend its entry here: `tests/test_mutants.py` names it.
"""

import ast
import importlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 120
"""Seconds that a test may take under a fault; one that is stopped has caught nothing."""
MOST_PROCESSES = 2
"""Faults that are tried at once, each with a copy of the tree."""
FAILED = 1
"""pytest's exit code where tests ran and one failed; others are mistakes of an entry."""
NOT_COPIED = ("__pycache__", "runs", "*.png", ".*")
IMPORTED = ("flax", "grain", "jax", "optax", "orbax.checkpoint", "pytest", "sentencepiece", "tyro")
"""What every test imports of others: loaded once, before the children."""


class Fault(NamedTuple):
    """A planted fault, and the test that must fail by it."""

    file: str
    right: str
    wrong: str
    test: str
    """file::name below tests/."""


# A file, tests, and after each test the pieces of the file whose change it must notice.
TABLE = """
== data/formats.py
test_preparing.py::test_parts_of_lines_have_the_lines_and_numbers_of_the_file
- start, before = end, before + lines
+ start, before = end, before
- return lines + bool(rest)
+ return lines
- if end is not None and at >= end:
+ if at >= path.stat().st_size:
test_preparing.py::test_parts_of_parquet_are_its_row_groups
- groups = range(start, file.num_row_groups if end is None else end)
+ groups = range(file.num_row_groups)
== data/preparing.py
test_preparing.py::test_several_processes_keep_what_one_keeps
- return _stored(sorted(folder
+ return _stored(list(folder
- unread=frozenset().union(*(found.unread for found in all_found)),
+ unread=all_found[0].unread,
test_preparing.py::test_a_script_is_not_run_again_in_each_process
- with _without_main():
+ with contextlib.nullcontext():
test_preparing.py::test_only_rows_are_progress
- if done > told:
+ if True:
== evaluation/reward_model.py
test_measures.py::test_a_reward_model_is_measured_on_every_pair_and_ties_are_half
- (gap_P > 0) +
+ (gap_P < 0) +
- + 0.5 * (gap_P == 0)
+ + 0 * (gap_P == 0)
test_evaluation.py::test_pairs_are_of_one_prompt_and_the_better_one_comes_first
- return better_reward_P - worse_reward_P
+ return worse_reward_P - better_reward_P
- (first_NC1 > 0) & (first_NC1 <
+ (first_NC1 <
test_measures.py::test_a_reward_model_is_measured_on_every_pair_and_ties_are_half
- float(gap_P.mean())
+ float(abs(gap_P).mean())
test_evaluation.py::test_pairs_are_of_one_prompt_and_the_better_one_comes_first
- criterion_P == name
+ criterion_P != name
test_evaluation.py::test_calibration_by_hand
- distance * inside_P.mean()
+ distance / BINS
- confidence - right_P[
+ confidence + right_P[
- np.exp(-size_P)
+ np.exp(-gap_P)
test_evaluation.py::test_length_correlation_is_of_candidates_alone
- length_correlation(rewards_NC[real_NC], lengths_NC[real_NC])
+ length_correlation(rewards_NC.ravel(), lengths_NC.ravel())

== evaluation/tables.py
test_measures.py::test_the_first_n_comparisons_are_read
- source.first(most)
+ source.first(most - 1)

== evaluation/intervals.py
test_evaluation.py::test_a_shares_interval_holds_what_wilson_says
- Z = 1.96
+ Z = 0.196
- spread * spread / 4) ** 0.5
+ spread * spread / 4)
- share + spread / 2
+ share - spread / 2
test_evaluation.py::test_values_between_0_and_1_count_as_so_many_more
- min(ratio, 1.0) / count
+ 1.0 / count
test_evaluation.py::test_a_mean_has_the_standard_error_of_its_values
- len(values) - 1, 1)
+ len(values), 1)
- Z * deviation /
+ deviation /

== data/batches.py
test_batches.py::test_an_evaluation_has_each_record_once_and_padding_at_the_end
- range(0, len(rows), self._batch_size)
+ range(0, len(rows) - self._batch_size + 1, self._batch_size)
test_measures.py::test_perplexity_is_of_the_first_n_records_each_once
- np.zeros_like(array, shape
+ np.ones_like(array, shape
test_batches.py::test_an_evaluation_has_each_record_once_and_padding_at_the_end
- range(len(self._source))[:records]
+ range(len(self._source))

== evaluation/perplexity.py
test_measures.py::test_perplexity_is_of_the_first_n_records_each_once
- np.exp(loss)
+ np.exp(2 * loss)
- rows.once(records=most)
+ rows.once()
- ["loss_mask_BT"].sum()
+ ["tokens_BT"].size

== evaluate.py
test_measures.py::test_a_file_is_evaluated_whole_unless_a_split_is_asked_for
- self.split or evaluated_split(self.data)
+ self.split or "heldout"

test_measures.py::test_a_win_rate_is_of_the_policy_over_the_other_run
- *ruled(ours, theirs, config
+ *ruled(theirs, ours, config
- "ended": float(ours
+ "ended": float(theirs

== evaluation/win_rate.py
test_evaluation.py::test_ties_are_half_a_win
- our_N > their_N
+ our_N < their_N
- 0.5 * tied_N
+ 1.0 * tied_N
- "reward": float(ours.mean())
+ "reward": float(theirs.mean())

== evaluation/steps.py
test_process.py::test_auc_and_first_error_against_loops
- (logits_M > 0) == right_M
+ (logits_M > 0) != right_M
- rights * (rights + 1) / 2
+ rights * (rights - 1) / 2
- / labelled_NT.sum()
+ / labelled_NT.size
test_evaluation.py::test_a_solution_without_a_doubted_step_finds_no_error
- doubted_NT.argmax(1), -1)
+ doubted_NT.argmax(1), 0)
test_process.py::test_majority_and_choices
- max(distinct,
+ min(distinct,

== evaluation/alignment.py
test_evaluation.py::test_an_alignment_says_how_often_ppo_is_better_than_sft
- wins(ppo, sft)
+ wins(sft, ppo)
- [summary[stage]["kinds"][kind] for stage in STAGES]
+ [summary[stage]["kinds"][kind] for stage in STAGES[::-1]]

== evaluation/gold.py
test_measures.py::test_distinct_answers_are_counted_against_the_distinct_right_ones
- len(given - {None})
+ len(right)
- len(given - {None})
+ len(given)
- max(len(right), 1)
+ max(len(responses), 1)
test_measures.py::test_gold_rows_and_their_summary
- bool(gold.harmless)
+ bool(gold.helpful)
- "kl": mean_interval(kls)
+ "kl": mean_interval(lengths)
- row["kind"] == kind
+ row["kind"] != kind
- share_interval([row[name]
+ share_interval([row["all"]
test_measures.py::test_the_gold_evaluation_of_training
- response.kl for
+ abs(response.kl - 1) for
test_measures.py::test_the_kl_of_a_response_is_the_policys_less_the_references_log_probability
- samples.logp_BR - reference_BR
+ reference_BR - samples.logp_BR
- * samples.mask_BR).sum(1)
+ ).sum(1)
- return responses[: len(prompts)]
+ return responses

== collect/rank.py
test_measures.py::test_rankings_put_the_best_by_gold_first
- ranking = [rank + 1 for
+ ranking = [len(ranks) - rank for
test_measures.py::test_pairs_name_what_they_differ_in
- "ranking": [rank + 1 for
+ "ranking": [2 - rank for
test_measures.py::test_collect_rank_asks_every_prompt_and_keeps_whole_distinct_answers
- start + ROWS, config.prompts
+ start + ROWS - 1, config.prompts
- tokenizer.ended(own)
+ map(tokenizer.decode, own)
- list(dict.fromkeys(ended))
+ ended

== collect/spin.py
test_measures.py::test_collect_spin_prefers_the_demonstration
- "chosen": chosen, "rejected": response
+ "chosen": response, "rejected": chosen
- min(start + ROWS, count))]
+ min(start + ROWS, count - 1))]

== collect/steps.py
test_measures.py::test_collect_steps_labels_every_solution
- return float(check(
+ return 1 - float(check(
- start + PROBLEMS, count)
+ start + PROBLEMS, count - 1)
test_measures.py::test_completions_label_a_step_by_the_share_that_comes_right
- np.mean(rights, axis=1)
+ np.max(rights, axis=1)

== collect/select.py
test_select.py::test_rows_are_written_with_all_that_they_hold
- np.arange(1, len(chosen) + 1)
+ np.arange(len(chosen))
- is_chosen_N[chosen] = True
+ is_chosen_N[:k] = True

== collect/scores.py
test_select.py::test_perplexity_and_ifd_are_of_the_response_alone
- np.exp(loss_N / tokens_N)
+ np.exp(loss_N / (tokens_N - 1))
- given_loss_N / alone_loss_N
+ alone_loss_N / given_loss_N

== data/rouge.py
test_synthesis.py::test_the_most_similar_text_is_missed_by_no_short_cut
- shared[place] += count
+ shared[place] += 1
test_synthesis.py::test_the_longest_common_subsequence_is_that_of_the_table
- | (row - hits)
+ & (row - hits)
test_synthesis.py::test_rouge_l_has_its_closed_forms
- return 2 * common_words(
+ return common_words(

== collect/self_instruct.py
test_synthesis.py::test_the_pool_grows_and_holds_nothing_above_the_overlap
- unfit(item) or _too_similar(item, similar)
+ unfit(item)
- made += tasks
+ tasks += made
test_synthesis.py::test_classification_is_asked_with_its_label_first
- (one, verdict == "yes")
+ (one, verdict == "no")
test_synthesis.py::test_instances_go_by_their_rule
- elif one in kept:
+ elif one in instances:

== collect/evol_instruct.py
test_synthesis.py::test_planted_failures_are_eliminated_and_their_instructions_tried_again
- seen.add(folded(made.row["instruction"]))
+ pass
- "" if verdict == "no" else
+ "" if verdict else

== collect/back_translate.py
test_synthesis.py::test_curated_instructions_fit_their_answers
- "" if score >= least_score
+ "" if score <= least_score

== collect/topics.py
test_synthesis.py::test_a_pair_may_differ_in_one_word
- "looks_risky", number, similar_alike)
+ "looks_risky", number, similar_risky)

== collect/rewrite.py
test_synthesis.py::test_rewritten_instructions_are_better_and_mean_the_same
- and second > first
+ and second >= first
- "" if verdict == "yes"
+ "" if verdict

== collect/writers.py
test_synthesis.py::test_what_was_stopped_goes_on_and_ends_as_if_it_had_not_been
- file.truncate(len(whole[:end].encode()))
+ pass
test_synthesis.py::test_of_a_list_that_was_cut_the_last_item_goes
- text[: starts[-1]].strip()
+ text.strip()

== evaluation/fits.py
test_fits.py::test_the_papers_own_parameters_on_its_own_table
- 1 - errors /
+ errors /
test_fits.py::test_criterion_is_twice_the_parameters_less_the_log_likelihood
- + 2 * (parameters + 1))
+ + 2 * parameters)

== collect/feedback.py
test_measures.py::test_comparison_rows_rank_by_the_mean_preference
- = 1 - prefer_CC[i, j]
+ = prefer_CC[i, j]
- (points > own)
+ (points < own)
- prefer(questions).mean(1)
+ prefer(questions).min(1)
test_measures.py::test_agreement_with_gold_counts_ties_as_half
- ranking[j] - ranking[i]
+ ranking[i] - ranking[j]
- 0.5 if gap == 0
+ 0.0 if gap == 0
test_measures.py::test_the_best_revision_by_reward_goes_on_and_violations_are_counted
- max(texts, key=
+ min(texts, key=
- [not getattr(verdict
+ [getattr(verdict
test_measures.py::test_collect_feedback_asks_every_prompt
- range(start, min(start + ROWS, count))
+ range(start, min(start + ROWS, count) - 1)

== train_rm.py
test_measures.py::test_the_shift_makes_good_responses_score_zero
- params["bias"] - mean
+ params["bias"] + mean
- np.argmin(record["ranking"])
+ np.argmax(record["ranking"])

== tasks/rules.py
test_measures.py::test_rules_are_kept_or_not
- RUDE.search(response) is None
+ RUDE.search(response) is not None
- _is_declined(response) ==
+ _is_declined(response) !=
- > LONGEST
+ >= LONGEST
- return kept / 3
+ return kept / 2

== rewards/judges.py
test_measures.py::test_a_judges_preference_is_the_mean_over_both_orders
- (first_QP + 1 - second_QP) / 2
+ (first_QP + second_QP) / 2
test_measures.py::test_the_simulated_judge_prefers_what_gold_finds_good
- 0.5 + gaps_QP / 2
+ 0.5 - gaps_QP / 2

== rewards/models.py
test_measures.py::test_a_text_is_scored_at_its_last_token_whatever_call_it_is_in
- return scores[: len(rows)]
+ return scores
- tokenizer.answer(response)
+ tokenizer.encode(response)

== rewards/scorer.py
test_measures.py::test_several_rewards_make_one_score
- for reward in config.reward]
+ for reward in sorted(scores)]
test_measures.py::test_texts_of_a_rollout_end_where_its_mask_does
- response_R[:length]
+ response_R

== responses.py
test_measures.py::test_responses_come_n_to_each_prompt_in_order_without_padding
- [: len(prompts) * n]
+ [: len(prompts)]
- response_R[:length]
+ response_R

== decoding/best_of_n.py
test_tables.py::test_the_best_of_the_first_n_is_the_first_of_the_highest
- scored.ranks_PN[:, :n].argmax(1)
+ scored.ranks_PN[:, :n].argmin(1)
- scored.ranks_PN[:, :n].argmax(1)
+ scored.ranks_PN.argmax(1)
- scored.ranks_PN[:, :n].argmax(1)
+ scored.rewards_PN[:, :n].argmax(1)

== decoding/rerank.py
test_tables.py::test_hits_of_every_way_to_choose
- score_PN[:, :n].argmax(1)
+ score_PN.argmax(1)
- np.average(right_PN, 1, new_PN)
+ right_PN.mean(1)
- right_PN.max(1)
+ right_PN.min(1)

== decoding/step_beam.py
test_process.py::test_step_search_on_a_tree_that_is_known
- key=lambda i: -scores[i]
+ key=lambda i: scores[i]
test_tables.py::test_a_search_tells_how_many_it_solved
- sampled / len(records)
+ sampled

== decoding/report.py
test_tables.py::test_numbers_of_samples_and_what_a_file_says
- n.bit_length())}
+ n.bit_length() - 1)}

== runtime/metrics.py
test_tables.py::test_a_pair_is_its_sum_over_its_weight
- return total / weight if
+ return total * weight if
test_tables.py::test_throughput_is_of_the_rows_after_the_first
- sum(counts[1:]) / span
+ sum(counts) / span

== runtime/figures.py
test_tables.py::test_a_smooth_curve_is_the_mean_of_a_window
- at + half + 1,
+ at + half,
test_tables.py::test_a_series_is_its_rows_and_means_of_parts_where_it_is_long
- part.mean() for part
+ part.max() for part
test_tables.py::test_panels_draw_what_was_measured_and_what_was_held_out
- ("held out", f"eval/{name}")
+ ("held out", name)
- _draw([("", kl, score)]
+ _draw([("", score, kl)]

== runtime/report.py
test_tables.py::test_a_report_shows_shares_in_per_cent_values_and_durations
- return f"{100 * share:.0f} %"
+ return f"{10 * share:.0f} %"
- width:{100 * (high - low)
+ width:{100 * (high + low)
test_tables.py::test_columns_of_a_report_are_the_stages_in_order
- bool(response.get(criterion))
+ not response.get(criterion)
- _percent(summary[stage].get("all"))
+ _percent(summary[stage].get("honest"))

== experiments/methods/table.py
test_tables.py::test_a_gain_is_over_the_other_method_on_the_same_seeds
- rows[method][seed]["all"] - rows[other][seed]["all"]
+ rows[other][seed]["all"] - rows[method][seed]["all"]
- rows[method].keys() & rows[other]
+ rows[method].keys() | rows[other]
test_tables.py::test_the_tables_of_the_study
- round(gain, 9) >= GAIN
+ round(gain, 9) > GAIN
- + row["reward_model_flops"]
+ + 0 * row["reward_model_flops"]

== experiments/methods/pages.py
test_tables.py::test_points_of_the_figures_are_gains_over_sft_the_best_first
- -item[1].gain
+ item[1].gain

== experiments/seeds.py
test_tables.py::test_a_gain_is_over_the_other_method_on_the_same_seeds
- stats.t.ppf(0.975,
+ stats.t.ppf(0.95,
- ddof=1
+ ddof=0

== experiments/methods/run.py
test_tables.py::test_a_method_is_judged_on_fresh_prompts_and_choices_on_others
- seed if config.tune else 1000 + seed
+ seed
test_tables.py::test_best_of_n_of_the_study_takes_the_highest_reward
- scored.ranks_PN[:, :n].argmax(1)
+ scored.rewards_PN[:, :n].argmax(1)

== experiments/data_sampling/pools.py
test_data_sampling.py::test_each_damage_is_of_its_share
- "chosen": pair["rejected"], "rejected": pair["chosen"]}
+ "chosen": pair["chosen"], "rejected": pair["rejected"]}

== experiments/data_sampling/court.py
test_data_sampling.py::test_wins_are_by_criteria_and_ties_half
- 0.5 * (1 + sign)
+ (0 + sign)
- passed.append(ours.all)
+ passed.append(ours.helpful)

== experiments/data_sampling/runs.py
test_data_sampling.py::test_steps_go_by_the_budget_or_are_equal
- whole if run.schedule == "equal_steps" else run
+ whole if run.schedule == "own" else run
test_data_sampling.py::test_flops_count_what_choosing_takes
- selection = passes * whole * one
+ selection = 0 * whole * one

== experiments/data_sampling/side_by_side.py
test_data_sampling.py::test_each_epoch_has_each_chosen_row_once
- rng.permutation(chosen)
+ rng.choice(chosen, len(chosen))
test_data_sampling.py::test_learning_rates_of_a_run_are_those_of_its_own_schedule
- for count in range(config.steps)]
+ for count in range(1, config.steps + 1)]

== experiments/data_sampling/verdicts.py
test_data_sampling.py::test_a_curve_is_judged_on_seeds_that_were_not_fitted
- ((even_NS, odd_NS),
+ ((even_NS, even_NS),
test_data_sampling.py::test_the_share_kept_is_of_the_gain
- np.stack([little_S - none_S, all_S - none_S])
+ np.stack([little_S, all_S])
test_data_sampling.py::test_holms_correction
- highest = max(highest, (count - rank)
+ highest = max(highest, (count)
test_data_sampling.py::test_isa_is_compared_with_the_best_other_sampler
- pair[1].mean() > best[1].mean()
+ pair[1].mean() < best[1].mean()
test_data_sampling.py::test_a_hump_is_told_from_a_plateau
- fall_S = y_NS[peak] - y_NS[-1]
+ fall_S = y_NS[peak] - y_NS[0]
test_data_sampling.py::test_savings_count_the_selection
- at_little = 1 - sum(flops["isa_A", LITTLE].values()) / whole
+ at_little = 1 - flops["isa_A", LITTLE]["training"] / whole
- least = 1 - sum(flops["isa_A", fewest].values()) / whole
+ least = 1 - flops["isa_A", fewest]["training"] / whole
test_data_sampling.py::test_the_null_controls
- interval(lost_isa_S - lost_random_S)
+ interval(lost_random_S - lost_isa_S)
"""


def read_table(table: str) -> list[Fault]:
    """Read lines `== file`, a test's name, `- right` and `+ wrong`; the last two are a fault."""
    faults = []
    file = test = right = ""
    for line in table.strip().splitlines():
        mark, _, text = line.partition(" ")
        if mark == "==":
            file = text
        elif mark == "-":
            right = text
        elif mark == "+":
            faults.append(Fault(file, right, text, test))
        elif line:
            test = line
    return faults


FAULTS = read_table(TABLE)


# ---- Entries ----


def planted(fault: Fault, root: pathlib.Path) -> str:
    """Return the text of the fault's file with the fault in it; raise ValueError for its mistake.

    The right text must stand there once, the test must exist, and the result must be Python.
    """
    text = (root / fault.file).read_text()
    found = text.count(fault.right)
    if found != 1:
        raise ValueError(f"{fault.file}: {fault.right!r} stands there {found} times, not once")
    file, _, name = fault.test.partition("::")
    if f"def {name}(" not in (root / "tests" / file).read_text():
        raise ValueError(f"{fault.file}: {fault.right!r}: no test {fault.test}")
    wrong = text.replace(fault.right, fault.wrong)
    ast.parse(wrong)
    if ast.dump(ast.parse(wrong)) == ast.dump(ast.parse(text)):
        raise ValueError(f"{fault.file}: {fault.wrong!r} changes nothing")
    return wrong


# ---- Tests in children ----


def run_tests(root: pathlib.Path, tests: Iterable[str], log: pathlib.Path) -> int:
    """Run tests of the tree `root` in a child of this process; return pytest's exit code.

    -1 where it was stopped after LONGEST. What they print is in the file `log`.
    """
    with warnings.catch_warnings():
        # JAX warns of forks: here it has no backend yet, and so no threads.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    # The child: it ends here, whatever happens.
    code = 3
    try:
        signal.alarm(LONGEST)
        code = _pytest(root, tests, log)
    finally:
        os._exit(code)


def _pytest(root: pathlib.Path, tests: Iterable[str], log: pathlib.Path) -> int:
    import pytest

    os.chdir(root)
    # Bytecode of a planted fault must not be taken for that of the file.
    sys.dont_write_bytecode = True
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    names = [f"tests/{test}" for test in tests]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *names]))


class Copy:
    """A copy of the tree that faults are planted in, one after the other."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "tree"
        self.log = folder / "log"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*NOT_COPIED))

    def catches(self, fault: Fault) -> tuple[bool, str]:
        """Return whether the fault's test fails, and what it printed where it does not."""
        path = self.root / fault.file
        right = path.read_text()
        path.write_text(planted(fault, self.root))
        try:
            code = run_tests(self.root, [fault.test], self.log)
        finally:
            path.write_text(right)
        told = self.log.read_text()[-2000:]
        return code == FAILED, f"pytest's code {code}\n{told}"


# ---- The command ----


def start_worker(folder: str) -> None:
    """Give this process a copy of its own below `folder`."""
    global own_copy
    own = pathlib.Path(folder) / str(os.getpid())
    own.mkdir()
    own_copy = Copy(own)


def try_out(fault: Fault) -> tuple[bool, str]:
    """Try a fault in this process's copy."""
    return own_copy.catches(fault)


def preload() -> None:
    """Import what all tests need of others, as tests/conftest.py sets it up."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # The copy's modules are imported, not those beside this file.
    sys.path[:] = [path for path in sys.path if pathlib.Path(path or ".").resolve() != ROOT]
    sys.path[:] = [path for path in sys.path if pathlib.Path(path).resolve() != ROOT / "tests"]
    for name in IMPORTED:
        importlib.import_module(name)


def passes_without(folder: pathlib.Path, faults: Sequence[Fault]) -> bool:
    """Tell whether all named tests pass where no fault is; print what they say where not."""
    folder.mkdir()
    clean = Copy(folder)
    code = run_tests(clean.root, sorted({fault.test for fault in faults}), clean.log)
    if code:
        print(clean.log.read_text())
    return code == 0


def main(argv: list[str]) -> int:
    """Plant the faults that have one of the words `argv`, or all; return the exit code."""
    began = time.monotonic()
    faults = []
    for fault in FAULTS:
        if not argv or any(word in " ".join(fault) for word in argv):
            planted(fault, ROOT)
            faults.append(fault)
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        if not passes_without(pathlib.Path(folder) / "clean", faults):
            print("error: a named test fails where no fault is planted")
            return 2
        # Each process has a copy and children of its own.
        count = min(MOST_PROCESSES, os.cpu_count() or 1)
        fork = multiprocessing.get_context("fork")
        caught = 0
        with fork.Pool(count, start_worker, (folder,)) as workers:
            for fault, (is_caught, told) in zip(
                faults, workers.imap(try_out, faults), strict=True
            ):
                caught += is_caught
                tell(fault, is_caught, told)
    print(f"{time.monotonic() - began:.0f} s")
    print(f"{len(faults)} planted, {caught} caught")
    return int(caught != len(faults))


def tell(fault: Fault, is_caught: bool, told: str) -> None:
    """Print a line on a fault, and what its test said where it passed."""
    verdict = "caught" if is_caught else "PASSED"
    print(f"{verdict}  {fault.file}: {fault.right} -> {fault.wrong}  ({fault.test})", flush=True)
    if not is_caught:
        print(told)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
