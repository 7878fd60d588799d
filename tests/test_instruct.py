"""The studies experiments/instruct: their rows, their comparisons and decisions, resuming."""

import json
import pathlib
from collections import Counter

import numpy as np
import pytest
from running import run

import train_sft
from experiments.data_sampling.runs import whole_lines
from experiments.instruct import descriptions, families, few_good, kinds, quality, replay, verdicts
from experiments.instruct import run as studies
from experiments.instruct.study import (
    Comparison,
    Config,
    all_above,
    kept_rows,
    outcomes,
)
from runtime import flags
from runtime.errors import UserError
from tasks import world
from tasks.world_gold import gold, parse


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def results_of(measures, name="all"):
    """Return lines of results, of {arm: its measure by seed}."""
    return [
        {"arm": arm, "seed": seed, name: value}
        for arm, values in measures.items()
        for seed, value in enumerate(values)
    ]


# --- comparisons and decisions


def test_differences_are_paired_by_seed_and_corrected():
    arms = list(quality.ARMS)
    results = results_of(dict(zip(arms, [(0.5, 0.6), (0.4, 0.4), (0.5, 0.5, 0.9)], strict=True)))
    steps, passes = outcomes(quality.compare(results))
    assert steps.mean == pytest.approx(0.15) and passes.mean == pytest.approx(0.05)
    # Student's t with one degree of freedom; the differences are 0.1 and 0.2.
    assert steps.half == pytest.approx(12.706 * 0.05, rel=1e-3)
    # Two-sided p of t = 3 is 0.2048; Holm doubles the smaller one.
    assert steps.p == pytest.approx(2 * 0.2048, rel=1e-3)
    assert passes.p == pytest.approx(0.5)
    # No filtered run of its seed: nothing is compared.
    results = results_of(dict(zip(arms, [(), (0.1,), (0.2,)], strict=True)))
    assert np.isnan(outcomes(quality.compare(results))[0].mean)


ABOVE, BELOW = (0.1, 0.11, 0.09, 0.1, 0.1), (-0.2, -0.21, -0.19, -0.2, -0.2)
NEITHER = (0.3, -0.3, 0.01, 0.1, -0.1)


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ((ABOVE, ABOVE), "held"),
        ((ABOVE, NEITHER), "not supported"),
        ((ABOVE, BELOW), "refuted"),
        ((ABOVE, (0.0,) * 5), "not supported"),
        ((ABOVE, ABOVE[:3]), "undecided: 3 of 5 seeds"),
        (((), ()), "undecided: 0 of 5 seeds"),
    ],
)
def test_a_claim_is_held_where_every_comparison_is_above_0(gaps, told):
    assert all_above(outcomes([Comparison("", list(of_seeds)) for of_seeds in gaps]), []) == told


@pytest.mark.parametrize(
    ("better_from", "told"),
    [(0, "held, from 0 % on"), (30, "held, from 30 % on"), (60, "refuted")],
)
def test_few_good_rows_are_enough_from_a_share_of_poor_ones_on(better_from, told):
    few = (0.5,) * 5
    worse, better = (0.6, 0.61, 0.59, 0.6, 0.6), (0.4, 0.41, 0.39, 0.4, 0.4)
    measures = {few_good.GOOD: few}
    for poor in few_good.POOR:
        measures[few_good.many(poor)] = better if poor >= better_from else worse
    assert few_good.decide(outcomes(few_good.compare(results_of(measures))), []) == told


def test_the_mixture_with_the_best_mean_rank_is_told():
    random = np.random.default_rng(0)
    results = []
    for name in kinds.ARMS:
        for seed in range(5):
            best = name == kinds.ALL_THREE
            shares = {kind: best + random.random() / 2 for kind in world.KINDS}
            results.append({"arm": name, "seed": seed, "all": 0.5, **shares})
    ranks = kinds.mean_ranks(results)
    assert set(ranks[kinds.ALL_THREE].values()) == {1.0}
    assert all_above(outcomes(kinds.compare(results)), []) == "held"
    # A seed that an arm lacks is not ranked.
    assert 4 not in kinds.mean_ranks(results[:-1])[kinds.ALL_THREE]


def test_replay_asks_for_less_forgetting_and_little_loss_of_gold():
    measures = dict(zip(replay.ARMS, (2.0, 1.5, 1.2, 1.0), strict=True))

    def decided(gold_at_5):
        results = []
        for number, (arm, loss) in enumerate(measures.items()):
            for seed in range(5):
                noise = number**2 * seed / 1000
                share = gold_at_5 if arm == "5 %" else 0.5
                line = {"arm": arm, "seed": seed, "all": share + noise}
                results.append({**line, "document_loss": loss + noise})
        return all_above(outcomes(replay.compare(results)), [])

    assert decided(0.49) == "held"
    assert decided(0.45) == "refuted"


def test_families_help_where_the_curve_is_a_plateau():
    x = np.array(families.COUNTS, float)
    noise = np.random.default_rng(0).normal(0, 0.002, (len(x), 6))

    def decided(y):
        curves = y[:, None] + noise
        measures = {
            str(count): curve for count, curve in zip(families.COUNTS, curves, strict=True)
        }
        results = results_of(measures)
        return families.decide(outcomes(families.compare(results)), results)

    assert decided(0.6 - 0.4 * np.exp(-0.5 * x)).startswith("held")
    assert decided(0.2 + 0.02 * x).startswith("not supported")
    assert decided(0.6 - 0.02 * x) == "refuted"


def test_without_descriptions_tasks_held_out_fall_more():
    rng = np.random.default_rng(0)

    def decided(of_held_out, of_trained_on):
        results = []
        for seed in range(5):
            noise = rng.normal(0, 0.002, 2)
            described = {"trained on": 0.8 + noise[0], "held out": 0.5 + noise[1]}
            alone = {"trained on": 0.8 - of_trained_on, "held out": 0.5 - of_held_out}
            results.append({"arm": descriptions.DESCRIBED, "seed": seed, **described})
            results.append({"arm": descriptions.ALONE, "seed": seed, **alone})
        return all_above(outcomes(descriptions.compare(results)), [])

    assert decided(0.4, 0.1) == "held"
    assert decided(0.1, 0.4) == "refuted"


# --- rows


def test_a_task_is_described_in_its_own_words_and_others_are_held_out():
    left_out, taken = descriptions.tasks_of(2)
    assert len(left_out) == descriptions.LEFT_OUT and not {*left_out} & {*taken}
    assert {*left_out, *taken} == {*descriptions.TASKS} and len(descriptions.TASKS) == 12
    inputs = descriptions.asked(taken, 200, "train", seed=2)
    assert len(inputs) == 200
    # What is asked of them was not trained on.
    given = {(one.request.relation, one.given) for one in inputs}
    for one in descriptions.asked(taken, 200, "heldout", seed=2):
        assert (one.request.relation, one.given) not in given
    names = Counter()
    for one in inputs:
        name = f"{one.request.kind} {one.request.relation}"
        # Of some countries nobody knows the capital.
        name = name.replace("unknowable", "lookup")
        names["listing" if one.request.kind == "listing" else name] += 1
        assert one.request.text.endswith(one.given)
        assert descriptions.shown(one, False) == one.given
    assert names.keys() == {*taken} and max(names.values()) - min(names.values()) <= 1


@pytest.mark.parametrize("poor", few_good.POOR)
def test_poor_rows_are_as_many_as_said_and_do_not_pass(poor):
    rows = list(few_good.rows(200, poor, seed=0))
    passed = [gold(prompt, response).all for prompt, response in rows]
    assert len(rows) == 200 and passed.count(False) == 2 * poor


def test_rows_of_a_kind_are_of_that_kind():
    for kind in ("lookup", "small_talk"):
        rows = list(kinds.rows_of_kind(kind, 50, seed=1))
        assert len(rows) == 50
        assert {parse(prompt).kind for prompt, _ in rows} == {kind}


def test_families_held_out_are_not_trained_on_and_each_has_its_share():
    assert len(families.FAMILIES) >= max(families.COUNTS) + families.LEFT_OUT
    left_out, taken = families.families_of(3)
    assert len(left_out) == families.LEFT_OUT and not {*left_out} & {*taken}
    assert families.families_of(4)[0] != left_out
    for count in families.COUNTS:
        rows = list(families.rows(taken[:count], 100, seed=3))
        requests = [parse(prompt) for prompt, _ in rows]
        counts = Counter((request.kind, request.relation) for request in requests)
        assert counts.keys() == {*taken[:count]} and len(rows) == 100
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(gold(*row).all for row in rows)


def test_rows_are_written_once(tmp_path):
    config = Config(work=str(tmp_path))
    first = kept_rows(config, "rows", 0, [("hello.", "hi.")])
    assert kept_rows(config, "rows", 0, []) == first
    (row,) = lines(first)
    assert [turn["content"] for turn in row["messages"]] == ["hello.", "hi."]


# --- the commands


def test_the_page_says_what_the_results_say(tmp_path):
    page = tmp_path / "README.md"
    page.write_text((verdicts.HERE / "README.md").read_text())
    verdicts.main(verdicts.Config(readme=str(page)))
    assert page.read_text() == (verdicts.HERE / "README.md").read_text()


@pytest.mark.slow
def test_the_studies_run_and_go_on(tmp_path):
    lm = f"{tmp_path}/lm"
    tiny = ["--model.preset=tiny", "--length=64", "--steps=1", "--batch_size=8", "--eval_every=0"]
    run(train_sft, f"--run={lm}", *tiny)
    argv = [f"--init={lm}", f"--work={tmp_path}/work", f"--out={tmp_path}", "--share=0.01"]

    def main(*more):
        return studies.main(flags.parse(studies.Config, [*argv, *more]))

    decisions = main("--prompts=16", "--seeds", "0")
    assert {*decisions.values()} == {"undecided: 1 of 5 seeds"}
    for study in studies.STUDIES:
        first = lines(tmp_path / f"{study.name}.jsonl")
        arms = [(line["arm"], line["seed"]) for line in first]
        assert arms == [(name, 0) for name in study.arms]

    # A line that was cut short, as a kill leaves it, is passed over.
    results = tmp_path / "quality.jsonl"
    with results.open("a") as file:
        file.write('{"arm": "filt')
    first = whole_lines(str(results))
    assert list(main("--study=quality", "--prompts=16", "--seeds", "0", "1")) == ["quality"]
    both = whole_lines(str(results))
    assert both[:3] == first and len(both) == 6
    # Runs of another setting are not counted with these.
    with pytest.raises(UserError, match="has runs of another prompts"):
        main("--study=quality", "--prompts=8")
    sizes = {len(lines(path)) for path in (tmp_path / "work").glob("rows-all-*-0.jsonl")}
    assert sizes == {63}
