"""Adapters: the base at first, the chain rule in float64, and they alone in a script's runs."""

import dataclasses
import json
import pathlib
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import run

import train_dpo
import train_lm
import train_ppo
import train_rm
import train_sft
from lora import INPUTS, LoraConfig, lora_base, merge, trainable_part, with_adapters
from model import LanguageModel, ScalarModel, init_and_apply
from model_config import stored_model
from objectives.likelihood import likelihood_objective
from objectives.policy import response_logprobs
from runtime import flags as config
from runtime.errors import UserError
from runtime.run_folder import finished_steps, read_manifest
from sharding import path_name
from tests.test_errors import fails
from tests.test_model import TINY, make, random_tokens, rows
from train_state import init_state, load_params
from train_step import make_train_step
from weights import convert as weights

LORA = LoraConfig(rank=3, alpha=6.0)


def adapters(params, seed=0):
    """Return fresh adapters of `params`, and ones with B at random too."""
    fresh = trainable_part(LORA, params, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return fresh, jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), fresh)


def largest_gap(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one, other)))


@pytest.mark.parametrize("model", [LanguageModel, ScalarModel])
@pytest.mark.parametrize("shape", [TINY, dataclasses.replace(TINY, gated=False)])
def test_adapters_start_as_the_base_and_merge_to_what_they_do(model, shape):
    params, apply = make(shape, model)
    inputs = rows(random_tokens(2, 7), (0, 2))

    def out(tree):
        return jax.tree.leaves(apply(tree, *inputs))[0]

    fresh, moved = adapters(params)
    base = lora_base(LORA, params)
    np.testing.assert_array_equal(out(with_adapters(LORA, base, fresh)), out(params))
    merged = merge(LORA, base, moved)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(out(with_adapters(LORA, base, moved)), out(merged), atol=2e-5)
    assert np.abs(out(merged) - out(params)).max() > 0.1  # control: they do something
    assert (
        with_adapters(LoraConfig(), None, params) is params
        and lora_base(LoraConfig(), params) is None
    )
    assert trainable_part(LoraConfig(), params, jax.random.key(0)) is params
    # A is normal by its fan-in, B zero.
    a = jax.tree_util.tree_leaves_with_path(
        trainable_part(LoraConfig(rank=64), params, jax.random.key(1))["decoder"]
    )
    for path, x in a:
        count = INPUTS[path[1].key][path[2].key[:-2]]
        fan_in = np.prod(x.shape[1 : 1 + count])
        assert (
            abs(np.std(x) * fan_in**0.5 - 1) < 0.1
            if path_name(path).endswith("_a")
            else not x.any()
        )


def test_gradients_are_those_of_the_chain_rule_and_the_base_stays():
    """In float64 dA = s dW B', dB = s A' dW, dW a plain model's gradient at the merged weights."""
    c = TINY
    params, _ = make(c)
    apply = init_and_apply(LanguageModel(c))[1]
    tokens, segments, positions = rows(random_tokens(4, 9), (0, 2, 0, 1))
    mask = (segments > 0) * (positions > 0) * np.float32(1)
    batch = {
        "tokens_BT": tokens,
        "segment_ids_BT": segments,
        "positions_BT": positions,
        "loss_mask_BT": mask,
    }
    objective = partial(likelihood_objective, apply)
    _, start = adapters(params)
    base = jax.tree.map(jnp.asarray, params)
    merged = merge(LORA, params, start)
    full = jax.jit(jax.grad(lambda p: objective(p, batch)[0] / mask.sum()))(merged)

    step = make_train_step(
        objective, optax.sgd(1.0), 2, max_norm=1e9, full=partial(with_adapters, LORA)
    )
    state, _ = step(init_state(jax.tree.map(jnp.asarray, start), optax.sgd(1.0)), batch, base)
    moved = jax.tree.map(lambda old, new: old - np.asarray(new), start, state.params)
    for part, names in INPUTS.items():
        for name in names:
            dw = np.asarray(full["decoder"]["layers"][part][name], np.float64)
            a, b = (
                np.asarray(start["decoder"]["layers"][part][f"{name}_{x}"], np.float64)
                for x in "ab"
            )
            flat = dw.reshape(len(dw), np.prod(a.shape[1:-1]), -1)
            wants = {"a": np.einsum("Lio,Lro->Lir", flat, b.reshape(len(b), LORA.rank, -1))}
            wants["b"] = np.einsum("Lir,Lio->Lro", a.reshape(len(a), -1, LORA.rank), flat)
            for x, want in wants.items():
                got = moved["decoder"]["layers"][part][f"{name}_{x}"].reshape(want.shape)
                np.testing.assert_allclose(
                    got, LORA.alpha / LORA.rank * want, atol=1e-4, err_msg=f"{name}_{x}"
                )
    assert largest_gap(base, params) == 0  # neither changed nor donated
    assert set(state.params) == {"decoder"} and set(state.params["decoder"]) == {"layers"}


# --- the scripts

SHORT = [
    "--optimizer.warmup=0",
    "--batch_size=8",
    "--length=64",
    "--eval_every=0",
    "--mesh.data=4",
    "--mesh.fsdp=2",
]
RANK = ["--lora.rank=2", "--optimizer.lr=0.01"]


def ppo_logprobs(apply, params, batch):
    return np.asarray(jax.jit(partial(response_logprobs, apply, temperature=1.0))(params, batch))


def stored(folder):
    step = finished_steps(pathlib.Path(folder) / "checkpoints")[0]
    return read_manifest(pathlib.Path(folder) / "checkpoints" / str(step))["arrays"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make the runs lm, and from it sft by adapters alone, four steps each."""
    r = tmp_path_factory.mktemp("lora")
    run(train_lm, *SHORT, "--model.preset=tiny", f"--run={r}/lm", "--steps=4")
    run(
        train_sft, *SHORT, *RANK, f"--init={r}/lm", f"--run={r}/sft", "--steps=4", "--save_every=2"
    )
    return r


def test_a_run_keeps_adapters_alone_and_others_load_it_whole(runs, tmp_path):
    arrays = stored(runs / "sft")
    assert all(
        name.endswith(("_a", "_b"))
        for name in arrays
        if name.startswith("params/") or "/mu/" in name
    )
    assert any("/mu/" in name for name in arrays)
    sft, lm = load_params(f"{runs}/sft"), load_params(f"{runs}/lm")
    assert jax.tree.structure(sft) == jax.tree.structure(lm) and largest_gap(sft, lm) > 1e-3
    assert np.array_equal(sft["decoder"]["embed"], lm["decoder"]["embed"])
    weights.main(config.parse(weights.Config, [f"--run={runs}/sft", f"--write={tmp_path}/out"]))
    weights.main(
        config.parse(weights.Config, [f"--read={tmp_path}/out", f"--run={tmp_path}/back"])
    )
    assert largest_gap(load_params(f"{tmp_path}/back"), sft) == 0


@pytest.mark.slow
def test_resuming_is_bitwise_equal(runs):
    shutil.copytree(runs / "sft", runs / "again")
    shutil.rmtree(runs / "again" / "checkpoints" / "4")
    run(
        train_sft,
        *SHORT,
        *RANK,
        f"--init={runs}/lm",
        f"--run={runs}/again",
        "--steps=4",
        "--save_every=2",
    )
    assert largest_gap(load_params(f"{runs}/again"), load_params(f"{runs}/sft")) == 0


@pytest.mark.slow
def test_dpo_compares_with_the_base_it_already_holds(runs):
    options = [*SHORT, f"--init={runs}/sft", "--optimizer.lr=0.01", "--steps=3"]
    for name, more in {
        "cached": ["--lora.rank=2"],
        "online": ["--lora.rank=2", "--reference=online"],
    }.items():
        run(train_dpo, *options, *more, f"--run={runs}/dpo-{name}")
        first = json.loads((runs / f"dpo-{name}" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)  # policy and reference are one
    assert (
        largest_gap(*(load_params(f"{runs}/dpo-{name}") for name in ("cached", "online"))) < 1e-5
    )
    # Its base is itself a run of adapters; loading goes down to the last.
    assert largest_gap(load_params(f"{runs}/dpo-online"), load_params(f"{runs}/sft")) > 1e-3


@pytest.mark.slow
def test_reward_model_and_ppo_train_adapters_and_heads(runs, monkeypatch):
    run(train_rm, *SHORT, *RANK, f"--init={runs}/lm", f"--run={runs}/rm", "--steps=3")
    assert {n for n in stored(runs / "rm") if n.startswith("params/") and n[-2] != "_"} == {
        "params/head",
        "params/bias",
    }
    reward = load_params(f"{runs}/rm")
    assert set(reward) == {"decoder", "head", "bias"} and reward["bias"] != 0
    ppo = [
        f"--init={runs}/lm",
        f"--reward={runs}/rm",
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
    ]
    ppo += [
        "--max_new_tokens=16",
        "--eval_every=0",
        "--mesh.data=4",
        "--mesh.fsdp=2",
        "--lora.rank=2",
    ]
    ppo += ["--save_every=1"]
    seen = []
    shared = []
    make_advantages = train_ppo.make_advantages

    def watched(config, apply, *rest, **tokens):
        compute_advantages = make_advantages(config, apply, *rest, **tokens)

        def watching(models, rollout, *more):
            policy, reference = models.policy, models.reference
            logps = [ppo_logprobs(apply, params, rollout) for params in (policy, reference)]
            shared.append(policy["decoder"]["embed"] is reference["decoder"]["embed"])
            seen.append((*logps, jax.device_get(rollout)))
            return compute_advantages(models, rollout, *more)

        return watching

    monkeypatch.setattr(train_ppo, "make_advantages", watched)
    # In it, check_first_update asserts a KL of 0.
    run(train_ppo, *ppo, f"--run={runs}/ppo", "--steps=2")
    policy, reference, batch = seen[-1]  # after the first iteration's updates
    # The reference is the base below the adapters, no copy, with the log-probabilities of its run.
    assert shared == [True, True]
    apply = init_and_apply(LanguageModel(stored_model(f"{runs}/lm")))[1]
    np.testing.assert_allclose(
        reference, ppo_logprobs(apply, load_params(f"{runs}/lm"), batch), atol=1e-5
    )
    assert np.abs(policy - reference).max() > 1e-3  # control: the policy has moved
    names = [n for n in stored(runs / "ppo") if "params/" in n]
    assert names and all(n.endswith(("_a", "_b", "/head", "/bias")) for n in names)
    assert largest_gap(load_params(f"{runs}/ppo"), load_params(f"{runs}/lm")) > 0


@pytest.mark.slow
def test_a_base_that_trains_on_is_read_at_its_step_and_one_that_is_gone_is_told(runs, capsys):
    for name in ("base", "kept"):
        shutil.copytree(runs / "lm", runs / name)

    def tune(base, name, steps):
        begin = [f"--init={runs}/{base}", f"--run={runs}/{name}", f"--steps={steps}"]
        run(train_sft, *SHORT, *RANK, *begin)
        return load_params(f"{runs}/{name}")

    first = tune("base", "moved", 1)
    # The base goes on training; the older of its two checkpoints is still the one that is used.
    run(train_lm, *SHORT, "--model.preset=tiny", f"--run={runs}/base", "--steps=5")
    assert largest_gap(load_params(f"{runs}/moved"), first) == 0
    # So it is where the adapters go on.
    assert largest_gap(tune("base", "moved", 2), tune("kept", "whole", 2)) == 0
    shutil.rmtree(runs / "base" / "checkpoints" / "4")
    with pytest.raises(UserError, match="its base, a step of"):
        load_params(f"{runs}/moved")
    assert "needs --init" in fails(train_sft, ["--lora.rank=2"], capsys)
