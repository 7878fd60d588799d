"""The study experiments/data_sampling: pools, members side by side, resuming, verdicts."""

import fcntl
import json
import random
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import fails, run

import train_dpo
import train_sft
from data.tokenizer import Tokenizer
from evaluation import fits
from experiments.data_sampling import chosen, court, pools, runs, side_by_side, verdicts
from experiments.data_sampling.runs import Run
from model import LanguageModel, init_and_apply
from model_config import ModelConfig
from sharding import MeshConfig, make_mesh
from tasks import world
from train_state import init_state
from train_step import OptimizerConfig

MODEL = ModelConfig(width=16, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=8, vocab=320)
MEMBERS = 3


def pairs_of(count):
    """Make pairs without a model: demonstrators of the best and of the worst quality."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < count:
        request = world.prompt(rng.randrange(10_000))
        sides = [world.respond(request, quality, rng) for quality in (1.0, 0.0)]
        if not world.gold(request.text, sides[1]).all:
            pairs.append({"prompt": request.text, "chosen": sides[0], "rejected": sides[1]})
    return pairs


# --- pools


def test_each_damage_is_of_its_share():
    pairs = pairs_of(200)
    flipped = pools.with_flips(pairs, random.Random(0))
    swapped = [a["chosen"] == b["rejected"] for a, b in zip(flipped, pairs, strict=True)]
    assert sum(swapped) == 0.2 * 200
    assert all(a["prompt"] == b["prompt"] for a, b in zip(flipped, pairs, strict=True))

    noisy = pools.with_noise(pairs, random.Random(0))
    changed = [a for a, b in zip(noisy, pairs, strict=True) if a != b]
    assert len(changed) == 0.05 * 200
    assert not any(world.gold(a["prompt"], a["chosen"]).all for a in changed)

    # Four fifths of the rows say what two of the pool say; their prompts are typed anew.
    doubled = pools.with_duplicates(pairs, random.Random(0))
    answers = [(a["chosen"], a["rejected"]) for a in doubled]
    often = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
    assert sum(often[:2]) >= 0.8 * 200 > sum(often[2:])
    assert len({a["prompt"] for a in doubled}) > len(set(answers))


def test_rows_of_kto_are_single_responses_with_their_labels():
    pairs = pairs_of(6)
    labels = [row["desirable"] for pair in pairs for row in pools.judged(pair)]
    assert labels == [True, False] * 6


# --- members side by side


def batch_of(rows, seed, kto):
    """Make one batch of candidates [B, 2, T] of random tokens."""
    rng = np.random.default_rng(seed)
    shape = (rows, 2, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), shape)
    desirable = rng.integers(1, 3, rows)
    ranks = np.stack([desirable, 0 * desirable], 1) if kto else np.tile([1, 2], (rows, 1))
    return {
        "tokens_BCT": rng.integers(0, MODEL.vocab, shape).astype(np.int32),
        "loss_mask_BCT": (positions > 5).astype(np.float32),
        "segment_ids_BCT": np.ones(shape, np.int32),
        "positions_BCT": positions.copy(),
        "ranks_BC": ranks.astype(np.int32),
        "margin_B": np.zeros(rows, np.float32),
        "reference_BC": rng.normal(-40, 3, (rows, 2)).astype(np.float32),
    }


def config_of(loss, steps):
    optimizer = OptimizerConfig(lr=1e-2, beta2=0.999, weight_decay=0.0, warmup=1)
    return train_dpo.Config(
        loss=loss, beta=0.1, unpaired=loss == "kto", steps=steps, model=MODEL, optimizer=optimizer
    )


def alone(config, params, batches):
    """Train one policy by the steps of train_dpo.py; return its parameters and losses."""
    update = train_dpo.make_update(config)
    prepare = train_dpo.make_prepare(
        config, make_mesh(MeshConfig(), jax.devices()[:1]), lambda batch: batch, None
    )
    state = init_state(jax.tree.map(jnp.array, params), update.optimizer)
    losses = []
    for batch in batches:
        state, metrics = update.step(state, prepare(state.params, batch))
        losses.append(float(metrics["loss"]))
    return state.params, losses


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_member_is_trained_as_by_train_dpo_alone(loss):
    init, _ = init_and_apply(LanguageModel(MODEL))
    params = init(jax.random.key(0))
    steps = 3
    config = config_of(loss, steps)
    batches = [
        [batch_of(8, 10 * member + step, loss == "kto") for step in range(steps)]
        for member in range(MEMBERS)
    ]

    # All members; the program is for runs of up to 7 steps.
    states = side_by_side.start(config, params, MEMBERS, 7)
    step = side_by_side.make_step(config)
    losses = []
    for number in range(steps):
        parts = [own[number] for own in batches]
        stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        states, metrics = step(states, stacked)
        losses.append(np.asarray(metrics["loss"]))

    moved = []
    for member in range(MEMBERS):
        expected, expected_losses = alone(config, params, batches[member])
        own = jax.tree.map(lambda x, m=member: x[m], states.params)
        np.testing.assert_allclose([x[member] for x in losses], expected_losses, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
        moved.append(own["decoder"]["embed"])
    # Control: members on other rows end elsewhere.
    assert np.abs(moved[0] - moved[1]).max() > 5e-3


def test_learning_rates_of_a_run_are_those_of_its_own_schedule():
    config = config_of("dpo", 6)
    rates = side_by_side.rates_of(config, 9)
    assert rates[1] == pytest.approx(1e-2) == rates.max()
    assert rates[5] == pytest.approx(1e-3) and (rates[6:] == 0).all()


def test_each_epoch_has_each_chosen_row_once():
    rows = np.array([3, 5, 8, 9])
    order = side_by_side.order_of(rows, 2, 4, seed=0)
    assert order.shape == (4, 2)
    for epoch in (order[:2], order[2:]):
        assert sorted(epoch.ravel().tolist()) == rows.tolist()


# --- the plan


def test_the_plan_has_each_run_once_and_the_headline_first():
    planned = runs.plan()
    assert len(planned) == len(set(planned))
    headline = [run for run in planned if run.seed >= runs.SEEDS]
    assert {(run.pool, run.sampler) for run in headline} == {
        ("clean", sampler) for sampler in ("none", "random", "isa_A", "all")
    }
    others = [i for i, run in enumerate(planned) if run.pool != "clean"]
    assert max(planned.index(run) for run in headline) < min(others)

    # Groups hold all runs once, each of one shape.
    groups = runs.groups_of(planned, 5)
    assert sorted(run for group in groups for run in group) == sorted(planned)
    for group in groups:
        assert len({(run.aligner, run.budget, run.schedule) for run in group}) == 1


def test_parts_hold_all_runs_once_and_each_costs_its_share():
    planned = runs.plan()
    for of in (1, 2, 4):
        parts = [runs.part_of(planned, part, of) for part in range(of)]
        assert sorted(run for part in parts for run in part) == sorted(planned)
        # No two parts make the same rows.
        cells = [{(run.pool, run.aligner) for run in part} for part in parts]
        assert sum(map(len, cells)) == len(set().union(*cells)) == 8
    # A pool's updates by both aligners are alike: of two parts each has two pools by either.
    for part in (0, 1):
        own = {(run.pool, run.aligner) for run in runs.part_of(planned, part, 2)}
        assert [aligner for _, aligner in own].count("kto") == 2


def test_lines_wait_for_those_of_another_process(tmp_path):
    path = tmp_path / "results.jsonl"
    with open(path, "a") as other, futures.ThreadPoolExecutor(1) as pool:
        # The other process is at work: half a line is in the file.
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write('{"one": ')
        other.flush()
        appended = pool.submit(runs.append, str(path), [{"two": 2}])
        assert not futures.wait([appended], timeout=0.3).done
        other.write("1}\n")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_UN)
        appended.result(timeout=60)
    assert path.read_text() == '{"one": 1}\n{"two": 2}\n'


def test_steps_go_by_the_budget_or_are_equal():
    run = Run("clean", "dpo", "random", 1, "own", 0)
    assert runs.steps_of(run, 2000) == 2
    assert runs.steps_of(run._replace(aligner="kto"), 2000) == 2
    assert runs.steps_of(run._replace(schedule="equal_steps"), 2000) == 200
    for budget in runs.BUDGETS:
        for aligner, batch in runs.BATCH.items():
            one = run._replace(budget=budget, aligner=aligner)
            assert runs.steps_of(one, 2000) * batch == runs.rows_of(one, 2000)


def test_flops_count_what_choosing_takes():
    run = Run("clean", "dpo", "isa_A", 5, "own", 0)
    whole = runs.flops_of(run._replace(sampler="all", budget=100), MODEL, 2000)
    isa = runs.flops_of(run, MODEL, 2000)
    random_rows = runs.flops_of(run._replace(sampler="random"), MODEL, 2000)
    assert whole["selection"] == random_rows["selection"] == 0
    assert isa["training"] == random_rows["training"] == pytest.approx(whole["training"] / 20)
    # A pass over one response a row, where all of training takes eight over its two.
    assert isa["selection"] > whole["training"] / 8


# --- a small study, from its start to its end


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a study of two budgets with a policy that answers by one of two words."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        shape = ["--model.preset=tiny", "--model.vocab=1280", "--model.layers=1"]
        short = ["--steps=2", "--batch_size=8", "--length=64", "--eval_every=0"]
        run(train_sft, *short, *shape, "--optimizer.warmup=0", f"--run={folder}/sft")
        tokenizer = Tokenizer.load(folder / "sft")
        # Pairs of the demonstrators, as if the policy had sampled them.
        fitting = []
        for pair in pairs_of(200):
            prompt = tokenizer.prompt(pair["prompt"])
            sides = [tokenizer.answer(pair[side]) for side in ("chosen", "rejected")]
            if len(prompt) + max(map(len, sides)) <= pools.LENGTH - 4:
                fitting.append(pair)
        patch.setattr(pools, "make_pairs", lambda model, count, seed: fitting[:count])
        patch.setattr(runs, "plan", lambda: PLAN)
        patch.setattr(verdicts, "plan", lambda: PLAN)
        yield folder


WHOLE_PLAN = runs.plan
PLAN = [Run("clean", "dpo", "none", 0, "own", seed) for seed in range(2)]
for _aligner in ("dpo", "kto"):
    for _sampler, _budget in (("random", 50), ("isa_A", 50), ("all", 100)):
        PLAN += [Run("duplicates", _aligner, _sampler, _budget, "own", seed) for seed in range(2)]


def small(study):
    return [
        f"--init={study}/sft",
        f"--work={study}",
        f"--out={study}/results.jsonl",
        "--members=2",
        "--prompts=8",
        "--pairs=40",
    ]


@pytest.mark.slow
def test_a_study_stops_and_goes_on_where_it_was(study, capsys):
    # Nothing is started after its minutes are over.
    assert run(runs, *small(study), "--minutes=0") == {"done": 0, "left": len(PLAN)}
    # Two processes share the rest: the first has the clean pool for dpo, the other one for kto.
    first = [one for one in PLAN if one.pool == "clean" or one.aligner == "kto"]
    assert run(runs, *small(study), "--of=2", "--part=0") == {"done": len(first), "left": 0}
    assert run(runs, *small(study), "--of=2", "--part=1") == {"done": len(PLAN), "left": 0}
    lines = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    rest = [one for one in PLAN if one not in first]
    assert [Run(*(line[name] for name in Run._fields)) for line in lines] == first + rest
    assert {line["steps"] for line in lines} == {0, 2, 4}
    assert all(0 <= line["gold"] <= line["criteria"] <= 1 for line in lines)

    # A line that was cut short, and one that is missing, are run again; the others are not.
    text = (study / "results.jsonl").read_text()
    whole = text.splitlines()
    (study / "results.jsonl").write_text("\n".join(whole[:-2]) + "\n" + whole[-2][:40])
    capsys.readouterr()
    assert run(runs, *small(study), "--missing") == {"done": len(PLAN) - 2, "left": 2}
    assert f"2 of {len(PLAN)} runs are left" in capsys.readouterr().out
    assert run(runs, *small(study)) == {"done": len(PLAN), "left": 0}
    again = runs.read_results(str(study / "results.jsonl"))
    for line in lines:
        key = Run(*(line[name] for name in Run._fields))
        assert again[key]["gold"] == line["gold"]


def test_every_sampler_chooses_distinct_rows(study):
    config = runs.Config(init=f"{study}/sft", work=str(study), pairs=40)
    pool = runs.pool_of(config, "clean", "kto", 0)
    taken = {}
    for sampler in pools.SAMPLERS:
        seen = pools.look(sampler, pool, config.init, runs.loaded(config.init), 0)
        taken[sampler] = set(pools.choose(seen, 8).tolist())
        assert len(taken[sampler]) == 8 and taken[sampler] <= set(range(80))
    # The null control takes other rows, and A and B are opposite ends.
    assert taken["isa_A"] != taken["isa_A" + pools.SHUFFLED]
    assert not taken["isa_A"] & taken["isa_B"]


def test_desirable_rows_are_counted(study):
    given = [f"--study.init={study}/sft", f"--study.work={study}", "--study.pairs=40"]
    lines = run(chosen, *given, "--samplers", "random", "isa_A", "--seeds=1", f"--out={study}/c")
    assert len(lines) == 2 * len(runs.BUDGETS[:-1])
    # 60 of 80 rows, of which 40 are desirable: a third at least, two thirds at most.
    assert all(1 / 3 <= line["desirable"] <= 2 / 3 for line in lines if line["budget"] == 75)
    assert f"{lines[0]['desirable']:.3f}" in verdicts.chosen_table(f"{study}/c")


def test_a_start_is_told_by_its_weights_alone(rng):
    params = {"embed": rng.normal(size=(3, 2)), "head": rng.normal(size=2)}
    again = {name: jnp.asarray(values) for name, values in params.items()}
    other = {**params, "head": params["head"] + 1e-3}
    single = {name: np.float32(values) for name, values in params.items()}
    assert pools.weights_sum(single) == pools.weights_sum(again) != pools.weights_sum(other)


@pytest.mark.slow  # reads the results of the study above
def test_results_of_another_start_are_refused(study, tmp_path, capsys):
    row = json.loads((study / "results.jsonl").read_text().splitlines()[0])
    (tmp_path / "other.jsonl").write_text(json.dumps({**row, "init": "another"}) + "\n")
    told = fails(runs, [*small(study), f"--out={tmp_path}/other.jsonl"], capsys)
    assert "another model than --init" in told


@pytest.mark.slow  # reads the results of the study above
def test_verdicts_are_written_between_the_marks(study, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{verdicts.FIRST}\nold\n{verdicts.LAST}\n\nafter\n")
    given = [f"--results={study}/results.jsonl", f"--readme={page}", f"--figure={tmp_path}/c.png"]
    assert run(verdicts, *given)["done"] == len(PLAN)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "\nold\n" not in text
    assert f"{len(PLAN)} of {len(PLAN)} runs are done" in text and "| not run |" in text
    assert "Win rate" in text and "an update of kto took" in text


# --- verdicts, on scores that are known


def made(score, seeds=10, aligners=("dpo", "kto"), samplers=("random", "isa_A")):
    """Make results: score(aligner, sampler, budget, rng) of each run of the clean pool."""
    rng = np.random.default_rng(0)
    results = {}
    for seed in range(seeds):
        for aligner in aligners:
            for sampler in samplers:
                for budget in (0, *runs.BUDGETS):
                    named = {0: "none", 100: "all"}.get(budget, sampler)
                    one = Run("clean", aligner, named, budget, "own", seed)
                    if budget == 0:
                        one = one._replace(aligner="dpo")
                    results[one] = {"gold": score(aligner, sampler, budget, rng)}
    return results


def saturating(aligner, sampler, budget, rng):
    kept = 1 - np.exp(-0.3 * budget * (3 if sampler == "isa_A" else 1))
    return 0.5 + 0.3 * kept + rng.normal(0, 0.004)


def rising(aligner, sampler, budget, rng):
    return 0.5 + 0.003 * budget + rng.normal(0, 0.004)


def test_a_plateau_is_told_from_a_line():
    found = verdicts.plateau(made(saturating), draws=40)
    assert [one.verdict for one in found] == ["confirmed", "confirmed"]
    found = verdicts.plateau(made(rising), draws=40)
    assert all(one.verdict.startswith("refuted: AIC") for one in found)
    assert [one.verdict for one in verdicts.plateau({})] == ["not run", "not run"]


def test_a_curve_is_judged_on_seeds_that_were_not_fitted():
    # Exact on the seeds of even number, elsewhere on the others.
    x_N = np.array([0.0, 1.0, 2.0, 5.0])
    y_NS = np.stack([x_N, x_N + 1, x_N, x_N + 1], 1)
    aic, _ = verdicts.held_out_aic(fits.LINE, x_N, y_NS)
    assert aic == pytest.approx(2 * fits.aic(np.ones(8), 2))


def test_little_data_keep_the_gain_or_do_not():
    found = {one.setting: one.verdict for one in verdicts.little_data(made(saturating))}
    assert found["clean, dpo"] == found["clean, kto"] == "confirmed"
    assert found["noise, kto"] == "not run"
    found = {one.setting: one.verdict for one in verdicts.little_data(made(rising))}
    assert found["clean, dpo"] == "refuted"


def test_the_share_kept_is_of_the_gain():
    none_S, all_S = np.full(6, 0.5), np.full(6, 0.7)
    kept = verdicts.share_kept(none_S, np.full(6, 0.65), all_S)
    assert kept.value == pytest.approx(0.75) and kept.low == pytest.approx(kept.high)


def test_holms_correction():
    # Holm 1979: sorted, times the number of those not yet rejected, never falling.
    corrected = verdicts.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, 0.02])


def test_isa_is_compared_with_the_best_other_sampler(monkeypatch):
    # Not that of the few runs below.
    monkeypatch.setattr(verdicts, "plan", WHOLE_PLAN)

    def score(aligner, sampler, budget, rng):
        return {"isa_A": 0.6, "random": 0.55, "k_center": 0.65}[sampler] + rng.normal(0, 0.003)

    results = made(score, samplers=("isa_A", "random", "k_center"))
    one = verdicts.compared(results, "clean", "dpo", 5)
    assert one.other == "k_center" and one.difference.high < 0
    # One that is not planned there is no rival.
    noise = {run._replace(pool="noise"): line for run, line in results.items()}
    assert verdicts.compared(noise, "noise", "dpo", 5).other == "random"
    (verdict,) = verdicts.better(results)
    assert verdict.verdict == "refuted" and verdict.seeds == 10
    # Without the better one it is above everywhere, and the other pools are still to be run.
    (verdict,) = verdicts.better(made(score))
    assert verdict.verdict == "undecided" and "above in 16, below in 0 of 16" in verdict.found


def test_a_hump_is_told_from_a_plateau():
    def score(aligner, sampler, budget, rng):
        fall = 0.002 * max(budget - 25, 0) if aligner == "dpo" else 0
        return min(0.5 + 0.01 * budget, 0.7) - fall + rng.normal(0, 0.003)

    (verdict,) = verdicts.hump(made(score))
    assert verdict.verdict == "confirmed" and "dpo peaks at 25 %" in verdict.found
    assert verdict.seeds == 10
    (verdict,) = verdicts.hump(made(rising))
    assert verdict.verdict == "refuted"


def test_the_null_controls():
    samplers = ("random", "isa_A", "isa_A_shuffled")
    results = made(rising, samplers=samplers)
    assert {one.verdict for one in verdicts.shuffled(results)} == {"confirmed"}
    better = {
        run: {"gold": row["gold"] + 0.02 * (run.sampler == "isa_A_shuffled")}
        for run, row in results.items()
    }
    assert {one.verdict for one in verdicts.shuffled(better)} == {"refuted"}
    # A seed that lacks a budget is left out on both sides.
    del better[Run("clean", "dpo", "isa_A_shuffled", 5, "own", 0)]
    assert [one.seeds for one in verdicts.shuffled(better)] == [9, 10]

    # Duplicates that cost random rows more, then reading A more.
    for loser, expected in (("random", "confirmed"), ("isa_A", "refuted")):
        damaged = dict(results)
        for one, row in results.items():
            cost = 0.1 if one.sampler == loser else 0.02
            damaged[one._replace(pool="duplicates")] = {"gold": row["gold"] - cost}
        assert {one.verdict for one in verdicts.duplicates(damaged)} == {expected}


def test_savings_count_the_selection():
    results = made(saturating)
    for one in results:
        results[one]["flops"] = runs.flops_of(one, MODEL, 2000)
    for verdict in verdicts.savings(results):
        assert verdict.verdict == "refuted" and "of training alone 0.950" in verdict.found
    # Control: were the rows chosen for nothing, they would save enough.
    for row in results.values():
        row["flops"] = {**row["flops"], "selection": 0.0}
    assert [one.verdict for one in verdicts.savings(results)] == ["confirmed", "confirmed"]


# --- the court


def test_wins_are_by_criteria_and_ties_half():
    requests = court.held_out(0, 40)
    shown = [
        world.demonstration(i, split="heldout", seed=court.HELD_OUT)["response"] for i in range(40)
    ]
    verdict = court.judged(requests, shown, 0, 1.0)
    passed = [world.gold(one.text, text).all for one, text in zip(requests, shown, strict=True)]
    assert verdict.win_rate == 0.5 and verdict.gold == sum(passed) / 40
    perfect = [world.respond(request, 1.0, random.Random(0)) for request in requests]
    verdict = court.judged(requests, perfect, 0, 1.0)
    assert verdict.gold == verdict.criteria == 1.0 and verdict.win_rate > 0.5


def test_members_answer_their_own_prompts(study):
    model = runs.loaded(f"{study}/sft")
    judge = court.make_court(model.config, model.tokenizer, 8, 4)
    same = jax.tree.map(lambda x: jnp.stack([x, x]), model.params)
    assert judge(same, [0, 0])[0] == judge(same, [0, 1])[0]
