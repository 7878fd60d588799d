"""Rows packed on the device against the same rows with their padding: equal but for rounding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import LanguageModel, ScalarModel, init_and_apply
from model_config import ModelConfig
from objectives import direct, group, imitate, unpadded
from objectives.likelihood import response_mask
from objectives.policy import policy_objective, response_logprobs, value_objective
from objectives.reward import process_objective, ranking_objective
from objectives.unpadded import Room, assign_slots, find_room, first_fit, run_model, with_room
from rollout import shuffled_minibatches
from sharding import MeshConfig, make_mesh, to_mesh
from train_state import init_state
from train_step import OptimizerConfig, make_optimizer, make_train_step

V = 32
CONFIG = ModelConfig(vocab=V, width=16, layers=2, heads=2, kv_heads=1, mlp_width=32, head_dim=8)
LM_INIT, LM = init_and_apply(LanguageModel(CONFIG))
SCALAR_INIT, SCALAR = init_and_apply(ScalarModel(CONFIG))
P, R = 6, 10


def rollout(rows=16, seed=0):
    """Return Experience-like rows: prompts of 1 to P tokens, responses of 1 to R, most short."""
    rng = np.random.default_rng(seed)
    prompt_B = rng.integers(1, P + 1, rows)
    response_B = np.minimum(rng.geometric(0.3, rows), R)
    place_T = np.arange(P + R)
    real_BT = (place_T >= P - prompt_B[:, None]) & (place_T < P + response_B[:, None])
    mask_BR = real_BT[:, P:].astype(np.float32)
    tokens_BT = (rng.integers(1, V, real_BT.shape) * real_BT).astype(np.int32)

    def normal():
        return rng.normal(size=mask_BR.shape).astype(np.float32)

    batch = {
        "tokens_BT": tokens_BT,
        "segment_ids_BT": real_BT.astype(np.int32),
        "positions_BT": np.maximum(real_BT.cumsum(1) - 1, 0).astype(np.int32),
        "response_BR": tokens_BT[:, P:],
        "mask_BR": mask_BR,
        "value_mask_BR": mask_BR,
        "old_logp_BR": normal() - 3,
        "reference_BR": normal() - 3,
        "advantages_BR": normal(),
        "old_values_BR": normal(),
        "returns_BR": normal(),
    }
    batch["loss_mask_BT"] = np.asarray(response_mask(batch))
    batch["targets_BT"] = (tokens_BT % 2).astype(np.float32)
    return jax.tree.map(jnp.asarray, batch)


def comparisons(prompts=8, seed=0):
    """Return three candidates to each prompt, some of them absent, padded on the right."""
    rng = np.random.default_rng(seed)
    shape = (prompts, 3, 12)
    ranks_BC = rng.integers(0, 3, shape[:2]).astype(np.int32)
    length_BC1 = rng.integers(3, 10, (prompts, 3, 1)) * (ranks_BC[..., None] > 0)
    place_T = np.arange(shape[2])
    real_BCT = np.broadcast_to(place_T < length_BC1, shape)
    batch = {
        "tokens_BCT": (rng.integers(1, V, shape) * real_BCT).astype(np.int32),
        "segment_ids_BCT": real_BCT.astype(np.int32),
        "positions_BCT": (place_T * real_BCT).astype(np.int32),
        "loss_mask_BCT": (real_BCT & (place_T >= 2)).astype(np.float32),
        "ranks_BC": ranks_BC,
        "margin_B": rng.uniform(size=prompts).astype(np.float32),
        "reference_BC": rng.normal(size=shape[:2]).astype(np.float32) - 10,
    }
    return jax.tree.map(jnp.asarray, batch)


SURROGATE = partial(
    group.surrogate_objective,
    LM,
    clip=0.2,
    clip_high=0.28,
    kl_coef=0.1,
    kl_estimator="k3",
    temperature=0.7,
)


def imitation(params, batch):
    both = {"policy": params, "reference": jax.tree.map(lambda x: 1.1 * x, params)}
    return imitate.imitation_objective(LM, both, batch, kl_coef=0.3)


OBJECTIVES = {
    "ppo": (partial(policy_objective, LM, clip=0.2, temperature=1.0), rollout),
    "ppo with entropy": (
        partial(policy_objective, LM, clip=0.2, temperature=0.8, entropy_coef=0.1),
        rollout,
    ),
    "critic": (partial(value_objective, SCALAR, clip=0.2), rollout),
    "grpo": (partial(SURROGATE, ratio="token", average="sequence"), rollout),
    "gspo": (partial(SURROGATE, ratio="geometric", average="tokens"), rollout),
    "raft": (imitation, rollout),
    # Centred, or the gradient of the head's bias would be rounding alone.
    "reward model": (
        partial(ranking_objective, SCALAR, lm_coef=0.5, center_rewards_coef=0.1),
        comparisons,
    ),
    "process reward model": (partial(process_objective, SCALAR), rollout),
    "dpo": (
        partial(direct.preference_objective, LM, loss=partial(direct.dpo, beta=0.1)),
        comparisons,
    ),
}


def params_of(objective):
    """Return random parameters of the model that an objective was bound to."""
    is_scalar = SCALAR in getattr(objective, "args", ())
    return (SCALAR_INIT if is_scalar else LM_INIT)(jax.random.key(1))


def with_gradient(objective, params, batch):
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)


def largest_difference(got, want):
    """Return the largest difference of two trees, leaf by leaf over the wanted one's largest."""

    def of_leaf(x, y):
        return float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-3))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, got, want)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_metrics_and_gradients_equal_the_padded_ones(name):
    objective, make_batch = OBJECTIVES[name]
    params, batch = params_of(objective), make_batch()
    room = find_room(batch)
    assert room is not None and not room.is_shared
    want = with_gradient(objective, params, batch)
    got = with_gradient(objective, params, with_room(batch, room))
    assert largest_difference(got, want) < 1e-5


def test_without_segments_they_would_not(monkeypatch):
    objective, make_batch = OBJECTIVES["ppo"]
    params, batch = params_of(objective), make_batch()
    slots_of = unpadded.assign_slots

    def one_segment(segment_ids_BT, rows):
        slots = slots_of(segment_ids_BT, rows)
        return slots._replace(segment_ids_NT=jnp.minimum(slots.segment_ids_NT, 1))

    monkeypatch.setattr(unpadded, "assign_slots", one_segment)
    want = with_gradient(objective, params, batch)
    got = with_gradient(objective, params, with_room(batch, find_room(batch)))
    assert largest_difference(got, want) > 1e-3


def updated(objective, params, batch, mesh_config, microbatches, is_packed):
    """Return parameters, loss and norm of the gradient after an update on a mesh."""
    mesh = make_mesh(mesh_config)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step = make_train_step(objective, optimizer, microbatches)
    state = init_state(jax.device_get(params), optimizer)
    batch = to_mesh(jax.device_get(batch), mesh)
    if is_packed:
        batch = unpadded.unpadded(batch, microbatches)
        assert "room" in batch
    state, metrics = step(state, batch)
    return jax.device_get((state.params, metrics["loss"], metrics["grad_norm"]))


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_update_on_a_mesh_equals_the_padded_one_on_another(microbatches):
    objective, _ = OBJECTIVES["ppo"]
    update = partial(updated, objective, LM_INIT(jax.random.key(1)), rollout(32))
    want = update(MeshConfig(data=8), microbatches, is_packed=False)
    got = update(MeshConfig(data=2, fsdp=2, tensor=2), microbatches, is_packed=True)
    assert largest_difference(got, want) < 1e-5


def test_each_device_packs_its_own_rows():
    mesh = make_mesh(MeshConfig(data=8))
    batch = unpadded.unpadded(to_mesh(jax.device_get(rollout(64)), mesh))
    logprobs = jax.jit(partial(response_logprobs, LM, temperature=1.0))
    program = logprobs.lower(LM_INIT(jax.random.key(1)), batch).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program and f"{collective}-start(" not in program


def test_minibatches_have_one_room_that_holds_them_all():
    batch = {**rollout(128), "room": Room(0.1)}  # that of the judgement is not theirs
    minibatches = list(shuffled_minibatches(batch, jax.random.key(0), 2, 4, microbatches=2))
    assert len({minibatch["room"] for minibatch in minibatches}) == 1
    for minibatch in minibatches:
        for part in (slice(0, None, 2), slice(1, None, 2)):
            rows = minibatch["segment_ids_BT"][part]
            assert int(unpadded.rows_used(rows)) <= minibatch["room"].rows(len(rows))


def test_every_token_has_a_slot_of_its_own(rng):
    for _ in range(20):
        rows, longest = rng.integers(1, 30), rng.integers(2, 20)
        length_B = rng.integers(0, longest + 1, rows)
        places = jax.device_get(first_fit(jnp.asarray(length_B), int(longest), int(rows)))
        assert places.fits_B.all() and sorted(places.rank_B) == list(range(rows))
        taken = np.zeros((rows, longest), int)
        for row, start, length in zip(places.row_B, places.start_B, length_B, strict=True):
            taken[row, start : start + length] += 1
            assert start + length <= longest
        assert taken.sum() == length_B.sum() and taken.max(initial=0) <= 1
        # Dosa 2007: first fit, the longest first, opens at most 11/9 OPT + 6/9 rows.
        fewest = -(-length_B.sum() // longest)
        used = taken.any(1).sum()
        opened = places.row_B[length_B > 0].max(initial=-1) + 1
        assert opened == used and used <= max(fewest * 2, 1)


def test_a_room_that_is_too_small_gives_no_number():
    batch = rollout()
    params = LM_INIT(jax.random.key(1))
    small = run_model(LM, params, with_room(batch, Room(0.1)))
    whole = run_model(LM, params, with_room(batch, Room(1.0)))
    is_nan_B = np.isnan(small.x_BTD).all((1, 2))
    assert is_nan_B.any() and not is_nan_B.all() and not np.isnan(whole.x_BTD).any()
    # The rows that have a place lose nothing to the others.
    np.testing.assert_allclose(small.x_BTD[~is_nan_B], whole.x_BTD[~is_nan_B], atol=1e-5)


def test_a_row_without_room_takes_no_slot():
    slots = assign_slots(jnp.ones((3, 3), jnp.int32).at[0, 2].set(0), rows=1)
    assert slots.fits_B.tolist() == [False, True, False]
    assert slots.of_token_BT.tolist() == [[-1] * 3, [0, 1, 2], [-1] * 3]
    assert slots.of_slot_NT.tolist() == [[3, 4, 5]]


def test_no_room_where_packing_saves_nothing_or_a_mesh_splits_rows():
    def rows(segment_ids_BT):
        """Return rows of which no two begin alike."""
        tokens_BT = jnp.arange(segment_ids_BT.size).reshape(segment_ids_BT.shape)
        return {
            "tokens_BT": tokens_BT,
            "segment_ids_BT": segment_ids_BT,
            "positions_BT": segment_ids_BT,
        }

    full_BT = jnp.ones((8, 16), jnp.int32)
    half = rows(full_BT.at[:, 8:].set(0))
    assert find_room(rows(full_BT)) is None and find_room(half) == Room(0.5)
    # Six rows of sixteen tokens: at least 6 / 8, of 2 ** -0.5 or 2 ** -(3 / 8) and so on.
    six = rows(full_BT.at[6:].set(0))
    assert find_room(six) is None and find_room(six, sizes=8) == Room(2 ** (-3 / 8))
    make_mesh(MeshConfig(sequence=2, data=4))
    assert find_room(half) is None


class Counted:
    """Two batches of rows in turn, and where one is in them, as data.batches.Batches has it."""

    def __init__(self, *batches):
        self.batches, self.position, self.seen = batches, 0, []

    def peek(self):
        self.seen.append(self.position + 1)
        return self.batches[self.position % 2]

    def __next__(self):
        self.position += 1
        return self.batches[(self.position - 1) % 2]


def test_batches_are_measured_a_step_ahead_and_the_position_is_not():
    """Before the update that runs meanwhile is dispatched; nothing is asked of the last one."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    long, short = (jax.device_get(rollout(32, seed)) for seed in (0, 1))
    short["segment_ids_BT"] = short["segment_ids_BT"] * (np.arange(32)[:, None] % 8 == 0)
    batches = Counted(long, short)
    rooms = []
    measured = unpadded.measured_ahead(batches, mesh, 4, microbatches=2)
    for number, (batch, room) in enumerate(measured, 1):
        assert batches.position == number and batch is (long, short)[(number - 1) % 2]
        assert batches.seen == list(range(1, min(number + 1, 4) + 1))
        rooms.append(room)
    want = [
        find_room(to_mesh(batch, mesh), microbatches=2, sizes=unpadded.OF_DATA)
        for batch in (long, short)
    ]
    assert rooms == want * 2 and want[0] != want[1]
