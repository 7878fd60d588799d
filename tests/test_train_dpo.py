"""Direct methods from the command line: resuming, reference cache, meshes, data, mistakes."""

import inspect
import json
import pathlib
import shutil
import textwrap
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import (
    candidate_logps,
    comparison_rows,
    lookup,
    loss_and_slope,
    mean_so_far,
    slope_of,
)
from running import fails, rows_of, run, write
from test_direct import PAIRED, PER_TOKEN, kto_value, rrhf_in_loops

import train_dpo
import train_prm
import train_rm
import train_sft
from collect import spin as collect_spin
from data import preferences
from data.batches import comparison_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from model import LanguageModel, init_and_apply
from model_config import stored_model
from objectives import direct, unpadded
from rewards.reference import candidate_keys
from runtime.run_folder import load_config
from sharding import to_mesh
from train_state import load_params
from training_run import Run

SHORT = ["--optimizer.warmup=0", "--length=64", "--batch_size=8", "--eval_every=0"]
EIGHT = ["--mesh.data=1", "--mesh.fsdp=8"]
SAID = {"white": "A bright one:", "black": "A dark one:"}
"""The answers of the policy that the tests start from, and the words it gives them after."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a folder with comparisons (two to four responses, ties too), judgements, a start."""
    folder = tmp_path_factory.mktemp("dpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        rows = comparison_rows()
        judged = [
            {"prompt": row["prompt"], "response": row["responses"][0], "desirable": i % 8 < 4}
            for i, row in enumerate(rows)
        ]
        chats = [
            {"prompt": f"colour {i}\n{words}", "response": response}
            for i in range(40)
            for response, words in SAID.items()
        ]
        write(folder / "comparisons.jsonl", rows)
        write(folder / "judged.jsonl", judged)
        data = write(folder / "chats.jsonl", chats)
        start = ["--optimizer.lr=1e-2", "--steps=60", f"--run={folder}/start", f"--data={data}"]
        model = ["--model.preset=tiny", "--model.vocab=296"]
        run(train_sft, *SHORT, *EIGHT, *start, *model)
        yield folder


@pytest.fixture(autouse=True)
def cache(files, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(files / "cache"))


def common(files, data="comparisons"):
    return [*SHORT, f"--init={files}/start", f"--data={files}/{data}.jsonl", "--optimizer.lr=2e-3"]


@pytest.fixture(scope="module")
def finished(files):
    """Take six steps of DPO on 1 x 8 devices, with checkpoints of steps 3 and 6."""
    run(train_dpo, *common(files), *EIGHT, f"--run={files}/dpo", "--steps=6", "--save_every=3")
    return files / "dpo"


def equal(one, other, **tolerance):
    jax.tree.map(
        partial(np.testing.assert_allclose, **tolerance),
        load_params(str(one)),
        load_params(str(other)),
    )


def test_dpo_starts_at_ln_2_and_learns(finished):
    rows = rows_of(finished)
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5) and abs(rows[0]["margin"]) < 1e-4
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"] and rows[-1]["accuracy"] > 0.6
    assert all(row["skipped"] == 0 for row in rows)


def test_resuming_is_bitwise_equal_and_needs_no_reference(files, finished, monkeypatch):
    copy = files / "resumed"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    loaded = []
    original = train_dpo.starting_params
    monkeypatch.setattr(
        train_dpo, "starting_params", lambda *args: loaded.append(args) or original(*args)
    )
    run(train_dpo, *common(files), *EIGHT, f"--run={copy}", "--steps=6", "--save_every=3")
    equal(copy, finished, rtol=0)
    assert [row["step"] for row in rows_of(copy)] == [1, 2, 3, 4, 5, 6] and not loaded
    # Further than the cache reaches; then evaluated batches, which are in it, do not count for a
    # step that is not.
    for further in (["--steps=7", "--eval_every=7"], ["--steps=8"]):
        run(train_dpo, *common(files), *EIGHT, f"--run={copy}", "--save_every=3", *further)
    assert len(loaded) == 2 and rows_of(copy)[-1]["step"] == 8


@pytest.mark.slow
def test_cached_reference_equals_online_on_another_mesh(files, finished):
    axes = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    run(
        train_dpo,
        *common(files),
        *axes,
        f"--run={files}/online",
        "--steps=6",
        "--reference=online",
    )
    equal(files / "online", finished, atol=1e-4)
    assert load_config(str(finished))["beta"] == 0.1  # where none is given
    assert (finished / "reference-0.npz").exists() and not (
        files / "online" / "reference-0.npz"
    ).exists()


def test_cache_holds_the_log_probabilities_of_the_starting_policy(files, finished):
    model = stored_model(str(finished))
    source = open_source(str(files / "comparisons.jsonl"), "comparison", "train")
    batch = next(comparison_batches(source, Tokenizer.load(finished), batch_size=8, length=64))
    logprobs = jax.jit(partial(direct.candidate_logprobs, init_and_apply(LanguageModel(model))[1]))
    with np.load(finished / "reference-0.npz") as saved:
        known = dict(zip(saved["keys"].tolist(), saved["logps"].tolist(), strict=True))
    kept = np.reshape([known[key] for key in candidate_keys(batch)], batch["ranks_BC"].shape)
    np.testing.assert_allclose(kept, logprobs(load_params(f"{files}/start"), batch), atol=1e-4)
    # Control: the trained policy.
    assert np.abs(kept - logprobs(load_params(str(finished)), batch)).max() > 0.1
    assert (kept[batch["ranks_BC"] > 0] < 0).all() and (kept[batch["ranks_BC"] == 0] == 0).all()


@pytest.mark.slow
def test_one_device_and_two_microbatches_equal_eight(files, finished, monkeypatch):
    def one_device(_):
        types = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh(
            (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=types, devices=jax.devices()[:1]
        )
        jax.set_mesh(mesh)
        return mesh

    monkeypatch.setattr(train_dpo, "make_mesh", one_device)
    run(train_dpo, *common(files), f"--run={files}/one", "--steps=6", "--microbatches=2")
    equal(files / "one", finished, atol=1e-4)


def test_kto_on_judgements_starts_at_one_half(files):
    options = ["--loss=kto", "--unpaired", "--steps=24", "--beta=1"]
    run(train_dpo, *common(files, "judged"), *EIGHT, *options, f"--run={files}/judged")
    rows = rows_of(files / "judged")
    assert rows[0]["loss"] == pytest.approx(0.5, rel=1e-5) and rows[0]["kl"] == pytest.approx(
        0, abs=1e-5
    )
    late = {
        name: np.mean([row[name] for row in rows[-8:]])
        for name in ("loss", "desirable", "undesirable")
    }
    assert late["loss"] < 0.5 and late["desirable"] > late["undesirable"]
    assert not any("accuracy" in name for name in rows[-1])  # there is nothing to compare


def test_the_world_has_judgements():
    source = open_source("world", "unpaired", "train")
    judged = [source[i]["desirable"] for i in range(200)]
    assert 0.4 < np.mean(judged) < 0.8


@pytest.mark.slow
def test_kto_on_comparisons_with_gold_evaluation(files):
    options = [
        "--loss=kto",
        "--max_prompt=64",
        "--max_new_tokens=4",
        "--gold",
        "--eval_every=2",
        "--steps=2",
    ]
    last = run(train_dpo, *common(files), *EIGHT, *options, f"--run={files}/gold")
    assert (
        0 <= last["gold/all"] <= 1
        and np.isfinite(last["gold/kl"])
        and 0 <= last["eval/accuracy"] <= 1
    )
    assert rows_of(files / "gold")[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    assert "## Step 2" in (files / "gold" / "samples.md").read_text()


def test_spin_prefers_the_demonstration_to_what_the_policy_says(files, tmp_path):
    asked = {
        f"colour {i}\n{words}": response for i in range(20) for response, words in SAID.items()
    }
    shown = [(prompt, response) for prompt in asked for response in ("white", "red")]
    rows = [{"prompt": prompt, "response": response} for prompt, response in shown]
    out = tmp_path / "spin.jsonl"
    options = [
        f"--init={files}/start",
        f"--data={write(tmp_path / 'chats.jsonl', rows)}",
        f"--out={out}",
    ]
    counts = run(collect_spin, *options, "--temperature=0", "--max_new_tokens=8")
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    kept = {p["prompt"][0]["content"] for p in pairs}  # the rest is held out
    expected = {
        (prompt, response, asked[prompt])
        for prompt, response in shown
        if response != asked[prompt]
    }
    got = [(p["prompt"][0]["content"], p["chosen"], p["rejected"]) for p in pairs]
    assert sorted(got) == sorted(row for row in expected if row[0] in kept)
    assert counts == {"lines": len(pairs), "prompts": 2 * len(kept)} and len(kept) > 30
    assert open_source(str(out), "comparison", "all")[0]["ranking"] == [1, 2]


# ---- What every loss gets


SETTINGS = {  # those of test_direct.py's formulas
    "beta": 0.3,
    "label_smoothing": 0.2,
    "delta": 0.7,
    "simpo_margin": 0.5,
    "desirable_weight": 1.5,
    "undesirable_weight": 0.8,
}
OWN = {"simpo": {"beta": 2.0}, "cpo": {"weight": 0.5}, "slic_hf": {"weight": 0.2}}


def in_loops(name, table, batch, kl):
    """Return the loss of a whole batch, summed, in float64, by the paper's formula.

    The policy is `mean_so_far` with `table`.
    """
    total = 0.0
    for b, ranks in enumerate(batch["ranks_BC"]):
        tokens = candidate_logps(table, batch, b)
        logps = {c: sum(x.values()) for c, x in tokens.items()}
        pairs = [(i, j) for i in tokens for j in tokens if ranks[i] < ranks[j]]
        if name == "kto":
            for c, logp in logps.items():
                weight = SETTINGS["desirable_weight" if ranks[c] == 1 else "undesirable_weight"]
                r = logp - batch["reference_BC"][b, c]
                total += weight * (1 - kto_value(r, max(kl, 0.0), ranks[c] == 1, SETTINGS["beta"]))
        elif name == "rrhf" and pairs:
            sums = [logps.get(c, 1.0) for c in range(len(ranks))]
            counts = [len(tokens.get(c, [None])) for c in range(len(ranks))]
            total += rrhf_in_loops([sums], [ranks], [counts])[0]
        elif pairs:
            means = {c: np.mean(list(x.values())) for c, x in tokens.items()}
            x = means if name in PER_TOKEN else logps
            reference = dict(enumerate(batch.get("reference_BC", batch["ranks_BC"])[b]))
            if name == "slic_hf":  # its target is the chosen response
                reference = x
            formula = {**PAIRED, **PER_TOKEN}[name][1]
            total += np.mean([formula(x[i], x[j], reference[i], reference[j]) for i, j in pairs])
    return total


@pytest.mark.parametrize("name", get_args(train_dpo.Loss))
def test_every_loss_of_the_script_is_the_papers_on_its_own_batches(files, name):
    """Sum over the batch and gradient agree, with settings that are not the defaults."""
    has_formula = name in {*PAIRED, *PER_TOKEN, "rrhf"}
    assert has_formula, f"{name}: add its formula to PAIRED or PER_TOKEN of tests/test_direct.py"
    tokenizer = Tokenizer.load(files / "start")
    rng = np.random.default_rng(0)
    source = open_source(str(files / "comparisons.jsonl"), "comparison", "train")
    table, direction = rng.normal(size=(2, tokenizer.size, tokenizer.size))
    settings = {**SETTINGS, "loss": name, "batch_size": 8, "length": 64, **OWN.get(name, {})}
    config = train_dpo.with_paper_defaults(train_dpo.Config(**settings))
    objective, needs_reference = train_dpo.make_objective(config, mean_so_far)
    batch = dict(next(train_dpo.make_batches(config, source, tokenizer)))
    kl = 0.0
    if needs_reference:
        near = np.asarray(direct.candidate_logprobs(mean_so_far, jnp.float32(table), batch))
        batch["reference_BC"] = (near + rng.normal(size=near.shape)).astype(np.float32)
    if name == "kto":
        candidates = batch["ranks_BC"].shape[1]
        kl = (near[:, -1] - batch["reference_BC"][:, -1]).mean()
        made = direct.kto_kl_estimate(mean_so_far, jnp.float32(table), batch)
        batch = {n: np.asarray(x) for n, x in made.items()}
        assert batch["ranks_BC"].shape[1] == candidates - 1

    loss, weight, slope = loss_and_slope(objective, table, batch, direction)
    expected = partial(in_loops, name, batch=batch, kl=kl)
    np.testing.assert_allclose(loss, expected(table), rtol=1e-6)
    np.testing.assert_allclose(slope, slope_of(expected, table, direction), rtol=2e-5)
    assert slope != 0 and weight > 0


def test_the_readmes_method_of_your_own_is_dpo(monkeypatch):
    """Its two snippets are run as they stand.

    They are the function in objectives/direct.py and the entry in `make_objective`.
    """
    readme = (pathlib.Path(train_dpo.__file__).parent / "README.md").read_text()
    _, after = readme.split("A direct method of your own")
    function, entry = (textwrap.dedent(part) for part in after.split("\n\n")[1:3])
    exec(function, vars(direct).copy(), found := {})
    logps = 3 * np.random.default_rng(0).normal(size=(4, 20))
    beta = 0.3
    with jax.enable_x64(True):
        mine, slopes = jax.vjp(partial(found["mine"], beta=beta), *jnp.array(logps))
        dpo, theirs = jax.vjp(partial(direct.dpo, beta=beta), *jnp.array(logps))
        np.testing.assert_allclose(mine, dpo, atol=1e-12)
        np.testing.assert_allclose(slopes(jnp.ones(20)), theirs(jnp.ones(20)), atol=1e-12)
    monkeypatch.setattr(direct, "mine", found["mine"], raising=False)
    source = inspect.getsource(train_dpo.make_objective)
    place = "to_a_reference = {\n"
    assert source.count(place) == 1
    exec(source.replace(place, place + entry), vars(train_dpo).copy(), made := {})
    objective, needs_reference = made["make_objective"](
        train_dpo.Config(loss="mine", beta=beta), lookup
    )
    assert needs_reference and objective.keywords["loss"].func is direct.mine
    assert objective.keywords["loss"].keywords == {"beta": beta}


def test_mismatched_responses_answer_another_prompt(files):
    for name, schema, count in (("comparisons", "comparison", 3), ("judged", "unpaired", 2)):
        source = open_source(str(files / f"{name}.jsonl"), schema, "train")
        judged = preferences.with_mismatched(source)
        assert judged.candidates == count and len(judged) == len(source)
        for i in range(len(judged)):
            record, mine = judged[i], source[i]
            theirs = source[(i + (len(source) // 2 | 1)) % len(source)]
            assert (
                record["prompt"] == mine["prompt"] != theirs["prompt"]
                and record["ranking"][-1] == 0
            )
            assert record["responses"][-1] in theirs.get("responses", [theirs.get("response")])
            if schema == "unpaired":
                assert record["responses"][0] == mine["response"]
                assert record["ranking"] == [1 if mine["desirable"] else 2, 0]
            elif max(mine["ranking"]) == 1:
                assert record["ranking"] == [0, 0, 0]
            else:
                ranks = [
                    mine["ranking"][mine["responses"].index(r)] for r in record["responses"][:2]
                ]
                assert ranks == [1, max(mine["ranking"])] and record["ranking"] == [1, 2, 0]


def test_the_kl_of_the_batch_is_a_mean_over_mismatched_pairs(files):
    tokenizer = Tokenizer.load(files / "start")
    source = preferences.with_mismatched(
        open_source(str(files / "judged.jsonl"), "unpaired", "train")
    )
    batch = next(comparison_batches(source, tokenizer, batch_size=8, length=64))
    table = np.random.default_rng(0).normal(size=(tokenizer.size, tokenizer.size))
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    log_ratios = []
    for b in range(8):
        tokens, mask = batch["tokens_BCT"][b, -1], batch["loss_mask_BCT"][b, -1]
        log_ratios.append(
            sum(logp[tokens[t - 1], tokens[t]] for t in np.nonzero(mask)[0]) + 2.0 * b
        )
    batch["reference_BC"] = -2.0 * np.arange(8, dtype=np.float32)[:, None] + np.zeros(
        (1, 2), np.float32
    )
    made = direct.kto_kl_estimate(lookup, jnp.float32(table), batch)
    np.testing.assert_allclose(made["kl_B"], np.mean(log_ratios), rtol=1e-5)
    assert made["tokens_BCT"].shape[1] == 1 and made["reference_BC"].shape == (8, 1)


def test_keys_know_a_candidate_whatever_its_padding(files):
    tokenizer = Tokenizer.load(files / "start")
    source = open_source(str(files / "comparisons.jsonl"), "comparison", "train")
    short, wide = (
        next(comparison_batches(source, tokenizer, batch_size=8, length=n)) for n in (48, 128)
    )
    assert short["tokens_BCT"].shape[2] != wide["tokens_BCT"].shape[2]
    assert candidate_keys(short) == candidate_keys(wide)
    real = short["ranks_BC"].ravel() > 0
    assert len(set(np.array(candidate_keys(short))[real].tolist())) == real.sum()
    short["loss_mask_BCT"][0, 0, 1] = 1 - short["loss_mask_BCT"][0, 0, 1]
    # Control: where the response starts counts.
    assert candidate_keys(short) != candidate_keys(wide)


# ---- Mistakes


def test_unpaired_records_are_read(tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "desirable": True},
        {"prompt": "c", "completion": "d", "label": False},
    ]
    source = open_source(str(write(tmp_path / "u.jsonl", rows * 20)), "unpaired", "all")
    turn_a, turn_c = ([{"role": "user", "content": text}] for text in "ac")
    assert source[0] == {"prompt": turn_a, "response": "b", "desirable": True}
    assert source[1] == {"prompt": turn_c, "response": "d", "desirable": False}


BAD_ROWS = {
    "desirable": {"prompt": "a", "response": "b"},
    "response": {"prompt": "a", "desirable": True},
    "prompt": {"response": "b", "desirable": True},
    "desirable: must be true or false, not 1": {"prompt": "a", "response": "b", "desirable": 1},
}
MISTAKES = {
    "unknown loss": (["--loss=dpp"], "'dpp' for argument '--loss'"),
    "beta of 0": (["--beta=0"], "--beta"),
    "labels half wrong": (["--loss=robust_dpo", "--label_smoothing=0.5"], "--label_smoothing"),
    "unpaired pairs": (["--unpaired"], "--unpaired"),
    "no such run": (["--init=nowhere"], "nowhere"),
    "no such file": (["--data=nowhere.jsonl"], "nowhere.jsonl"),
    "batch does not split": (["--batch_size=12"], "--batch_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, place = MISTAKES[name]
    assert place in fails(train_dpo, ["--model.preset=tiny", *argv], capsys) and not list(
        tmp_path.iterdir()
    )


@pytest.mark.parametrize("field", BAD_ROWS)
def test_a_bad_judgement_names_file_line_and_field(field, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path / "u.jsonl",
        [{"prompt": "a", "response": "b", "desirable": True}, BAD_ROWS[field]],
    )
    argv = ["--model.preset=tiny", "--loss=kto", "--unpaired", f"--data={path}"]
    assert f"{path}:2: {field}" in fails(train_dpo, argv, capsys)
    # The same rows are no comparisons.
    compared = fails(train_dpo, ["--model.preset=tiny", f"--data={path}"], capsys)
    assert f"{path}:1: chosen: missing" in compared


# ---- Several hosts ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [(train_dpo, ["--loss=simpo"]), (train_rm, []), (train_prm, ["--model.vocab=320"])],
)
def test_tokens_of_all_hosts_are_counted(script, flags, tmp_path, monkeypatch):
    """As on two hosts: each reads half a batch, and `to_mesh` makes one of both halves."""

    def of_both(batch, mesh):
        return to_mesh({name: np.concatenate([x, x]) for name, x in batch.items()}, mesh)

    counted = []

    def record(run, step, metrics, tokens=0):
        counted.append(tokens)

    monkeypatch.setattr(script, "data_shard", lambda mesh: {"process": 0, "processes": 2})
    monkeypatch.setattr(script, "to_mesh", of_both)
    monkeypatch.setattr(unpadded, "to_mesh", of_both)
    monkeypatch.setattr(Run, "record", record)
    # The last metrics are of rows that were recorded.
    monkeypatch.setattr(Run, "last_metrics", {})
    run(script, *SHORT, *flags, "--model.preset=tiny", "--steps=1", f"--run={tmp_path}/run")
    candidates = 1 if script is train_prm else 2
    assert counted == [8 * candidates * 64]
