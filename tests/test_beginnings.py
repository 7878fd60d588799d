"""Beginnings computed once against the same rows one by one: equal but for rounding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import ALL
from test_unpadded import (
    CONFIG,
    LM,
    LM_INIT,
    OBJECTIVES,
    P,
    comparisons,
    largest_difference,
    params_of,
    rollout,
    updated,
    with_gradient,
)

from kernels.attention import attention, masked_attention
from kernels.layouts import SharedRows
from model import LanguageModel, ScalarModel, init_and_apply
from objectives import beginnings, unpadded
from objectives.policy import response_logprobs
from objectives.unpadded import LAID_OUT, Room, find_room, run_model, with_room
from sharding import MeshConfig, make_mesh, to_mesh

GROUP = 4


@pytest.fixture(autouse=True)
def shared_wherever_fewer_rows_do(monkeypatch):
    monkeypatch.setattr(unpadded, "LAID_OUT", 0.0)


def alike(batch, columns, group):
    """Return `batch` with the first `columns` of `group` neighbouring rows those of the first.

    A row without a real token stays as it is.
    """
    axes = "BCT" if "tokens_BCT" in batch else "BT"
    names = [f"{name}_{axes}" for name in ("tokens", "segment_ids", "positions")]
    shape = batch[names[0]].shape
    tokens_BT, segment_ids_BT, _ = (np.array(batch[x]).reshape(-1, shape[-1]) for x in names)
    row_B = np.arange(len(tokens_BT)) // group * group
    is_used_B1 = segment_ids_BT.any(1, keepdims=True)
    for x_BT in (tokens_BT, segment_ids_BT):
        x_BT[:, :columns] = np.where(is_used_B1, x_BT[row_B, :columns], x_BT[:, :columns])
    positions_BT = np.maximum(segment_ids_BT.cumsum(1) - 1, 0)
    arrays = (tokens_BT, segment_ids_BT, positions_BT)
    new = {name: jnp.asarray(x.reshape(shape)) for name, x in zip(names, arrays, strict=True)}
    return {**batch, **new}


def groups(rows=16, seed=0):
    """Return a rollout in which GROUP neighbours answer a prompt each."""
    return alike(rollout(rows, seed), P, GROUP)


def rankings(prompts=8, seed=0):
    """Return comparisons whose candidates share a prompt of three tokens."""
    return alike(comparisons(prompts, seed), 3, 3)


COMPARED = ("ppo", "grpo", "dpo", "reward model", "process reward model")


def alike_of(name):
    """Return an objective of test_unpadded, its parameters, and rows for it that begin alike."""
    objective, make_batch = OBJECTIVES[name]
    return objective, params_of(objective), {rollout: groups, comparisons: rankings}[make_batch]()


# The rest differ in what test_unpadded.py compares already.
@pytest.mark.parametrize(
    "name",
    [
        name if name in COMPARED else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
    ],
)
def test_losses_metrics_and_gradients_equal_the_padded_ones(name):
    objective, params, batch = alike_of(name)
    room = find_room(batch)
    assert room.is_shared
    want = with_gradient(objective, params, batch)
    got = with_gradient(objective, params, with_room(batch, room))
    assert largest_difference(got, want) < 1e-5


def test_of_rows_that_only_seem_alike_they_would_not(monkeypatch):
    objective, params, batch = alike_of("reward model")
    room = find_room(batch)
    want = with_gradient(objective, params, comparisons())
    got = with_gradient(objective, params, with_room(comparisons(), Room(1.0, is_shared=True)))
    assert largest_difference(got, want) < 1e-5

    # The owners of the one batch are not those of the other.
    owner_BT = beginnings.owners(*(batch[f"{x}_BCT"].reshape(24, -1) for x in NAMES))
    monkeypatch.setattr("objectives.unpadded.owners", lambda *arrays: owner_BT)
    got = with_gradient(objective, params, with_room(comparisons(), room))
    assert largest_difference(got, want) > 1e-3


NAMES = ("tokens", "segment_ids", "positions")


@pytest.mark.parametrize(
    "name, microbatches",
    [
        pytest.param("grpo", 2, marks=pytest.mark.slow),
        pytest.param("grpo", 1, marks=pytest.mark.slow),
        pytest.param("reward model", 2, marks=pytest.mark.slow),
        pytest.param("reward model", 1, marks=pytest.mark.slow),
    ],
)
def test_an_update_on_a_mesh_equals_the_padded_one_on_another(name, microbatches):
    objective, params, _ = alike_of(name)
    batch = groups(32) if name == "grpo" else rankings(16)
    want = updated(objective, params, batch, MeshConfig(data=8), microbatches, is_packed=False)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    got = updated(objective, params, batch, mesh, microbatches, is_packed=True)
    assert largest_difference(got, want) < 1e-5


def test_each_device_has_slots_for_its_own_rows():
    mesh = make_mesh(MeshConfig(data=8))
    batch = unpadded.unpadded(to_mesh(jax.device_get(groups(64)), mesh))
    assert batch["room"].is_shared
    logprobs = jax.jit(partial(response_logprobs, LM, temperature=1.0))
    program = logprobs.lower(LM_INIT(jax.random.key(1)), batch).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program and f"{collective}-start(" not in program


# ---- Owners and slots ----


def prefixes(rng, rows, length):
    """Draw rows of few tokens, so that many begin alike, padded on either side; see `inputs`."""
    tokens_BT = rng.integers(1, 3, (rows, length))
    start_B1 = rng.integers(0, 2, (rows, 1))
    end_B1 = rng.integers(length // 2, length + 1, (rows, 1))
    place_T = np.arange(length)
    real_BT = (place_T >= start_B1) & (place_T < end_B1)
    positions_BT = np.maximum(real_BT.cumsum(1) - 1, 0)
    arrays = (tokens_BT * real_BT, real_BT, positions_BT)
    return tuple(jnp.asarray(x, jnp.int32) for x in arrays)


def test_a_token_is_owned_by_the_first_row_that_begins_so(rng):
    for _ in range(5):
        arrays = prefixes(rng, 7, 6)
        owner_BT = beginnings.owners(*arrays)
        entries_BTE = np.stack(arrays, -1)
        for row, column in np.ndindex(owner_BT.shape):
            is_alike_B = (entries_BTE[:, : column + 1] == entries_BTE[row, : column + 1]).all(
                (1, 2)
            )
            is_real = arrays[1][row, column] > 0
            assert owner_BT[row, column] == (is_alike_B.argmax() if is_real else 7)


def shared_rows(arrays):
    """Return SharedRows of one group, with the slots it needs, and the owners [B, T]."""
    owner_BT = beginnings.owners(*arrays)
    distinct = int(beginnings.is_own(owner_BT).sum())
    rows = -(-distinct // owner_BT.shape[1])
    shared = beginnings.share_slots(owner_BT, rows)
    assert shared.fits_B.all()
    return SharedRows(arrays[1], shared.slot_BT[None], owner_BT[None], shared.token_NT[None])


def test_every_distinct_token_has_a_slot_of_its_own(rng):
    for _ in range(5):
        shared = shared_rows(prefixes(rng, 9, 8))
        owner_BT, slot_BT = np.array(shared.owner_GBT[0]), np.array(shared.slot_GBT[0])
        is_real_BT = owner_BT < 9
        beginnings_of_rows = owner_BT * 8 + np.arange(8)
        pairs = set(zip(beginnings_of_rows[is_real_BT], slot_BT[is_real_BT], strict=True))
        assert len(pairs) == len({slot for _, slot in pairs}) == len({own for own, _ in pairs})
        assert (slot_BT[~is_real_BT] == -1).all()
        assert (
            np.array(shared.rows(shared.token_GNT[0]))[is_real_BT]
            == beginnings_of_rows[is_real_BT]
        ).all()


# ---- Attention over slots ----


def seen_slots(shared, window):
    """Return [1, slots, slots] bool: whether a slot's token sees another's, by the owner's row."""
    slots = shared.token_GNT.size
    length = shared.segment_ids_BT.shape[1]
    token_M = np.array(shared.token_GNT).reshape(-1)
    mask_MM = np.zeros((1, slots, slots), bool)
    for slot, token in enumerate(token_M):
        row, column = divmod(int(token), length)
        first = 0 if window is None else max(0, column - window + 1)
        path = (
            np.array(shared.slot_GBT)[0, row, first : column + 1]
            if token >= 0
            else np.array([], int)
        )
        mask_MM[0, slot, path[path >= 0]] = True
    return mask_MM


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("window, soft_cap", [(None, None), (3, None), (None, 1.5)])
def test_attention_over_slots_sees_each_token_s_own_beginning(
    implementation, window, soft_cap, rng
):
    if implementation == "library" and soft_cap:
        pytest.skip("the library has no soft cap")
    shared = shared_rows(prefixes(rng, 6, 16))
    mask_MM = seen_slots(shared, window)
    shape = shared.token_GNT.shape[1:]
    width = 64 if implementation.startswith("pallas") else 8

    def normal(heads):
        return rng.normal(size=(*shape, heads, width)).astype(np.float32)

    arrays = (normal(4), normal(2), normal(2))
    weights = normal(4)

    def got(q, k, v):
        out = attention(
            q,
            k,
            v,
            segment_ids=shared,
            window=window,
            soft_cap=soft_cap,
            implementation=implementation,
        )
        return (out * weights).sum(), out

    # All slots as one row under the mask, in float64.
    def want(q, k, v):
        rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        out = masked_attention(*rows, mask_MM, soft_cap=soft_cap).reshape(q.shape)
        return (out * weights).sum(), out

    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in arrays]
        wanted = jax.device_get(jax.jit(jax.grad(want, (0, 1, 2), has_aux=True))(*exact))
    gotten = jax.jit(jax.grad(got, (0, 1, 2), has_aux=True))(*arrays)
    assert largest_difference(gotten, wanted) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [{}, {"window_pattern": (False, True), "rope_local_base": 50.0, "logit_soft_cap": 2.0}],
)
def test_a_model_with_a_window_sees_through_it(fields, rng):
    init, apply = init_and_apply(LanguageModel(dataclasses.replace(CONFIG, window=3, **fields)))
    batch = groups()
    params = init(jax.random.key(1))
    run = jax.jit(partial(run_model, apply))
    want = run(params, batch).x_BTD
    got = run(params, with_room(batch, find_room(batch))).x_BTD
    is_real_BT = batch["segment_ids_BT"] > 0
    assert np.abs((got - want)[is_real_BT]).max() < 1e-5


# ---- Room ----


def test_beginnings_are_shared_where_that_saves_most(monkeypatch):
    monkeypatch.setattr(unpadded, "LAID_OUT", LAID_OUT)
    # Of short rows among padding attention is most, and it skips none of that.
    assert not find_room(groups()).is_shared
    long = jax.tree.map(lambda x: x[:, :P], groups())
    whole = {**long, "segment_ids_BT": jnp.ones_like(long["segment_ids_BT"])}
    room = find_room(whole)
    assert room.is_shared and room.share <= 0.5


def test_a_room_that_is_too_small_gives_no_number():
    batch = groups()
    init, apply = init_and_apply(ScalarModel(CONFIG))
    params = init(jax.random.key(1))
    run = jax.jit(partial(run_model, apply))
    small = run(params, with_room(batch, Room(0.1, is_shared=True)))
    whole = run(params, with_room(batch, Room(1.0, is_shared=True)))
    is_nan_B = np.isnan(small.scalars_BT).all(1)
    assert is_nan_B.any() and not is_nan_B.all() and not np.isnan(whole.scalars_BT).any()
