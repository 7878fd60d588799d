"""Rollouts of PPO, GRPO and RAFT: sample, join to the prompts, log, cut into minibatches.

B rows, P tokens of prompt, R of response, T = P + R. One row, with P = 4 and R = 4:

    position        0     1     2     3     4     5     6     7
    tokens_BT     pad   bos    is    it   yes     .   eos   pad
    segment_ids     0     1     1     1     1     1     1     0
    response_BR                           yes     .   eos   pad
    mask_BR                                 1     1     1     0

Prompts are padded on the left, so every response starts at position P. Responses are padded on
the right; their end-of-turn token is under the mask, which marks what the policy drew: a fork
whose environment writes tokens into a response leaves holes there. Which position predicts a
response's token is explained in objectives/policy.py.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.batches import Batches
from data.records import Record
from data.tokenizer import Tokenizer
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.policy import kl_estimate, last_places, masked, masked_mean
from objectives.unpadded import OF_ROLLOUTS, find_room, model_inputs, unpadded, with_room
from runtime.errors import UserError, require
from runtime.samples import SampleRow
from sampling import Apply, Ends, Samples, SamplingConfig, ends, generate, stages_of
from sharding import (
    BATCH,
    along,
    constrain_batch,
    gathered,
    gathered_shapes,
    path_name,
    to_host,
    to_mesh,
    with_wider_tensor,
)

Array = jax.Array
Mesh = jax.sharding.Mesh
Batch = dict[str, Array]
"""Arrays by name; a docstring names the keys."""
Metrics = dict[str, Any]
"""Scalars by name, of the device or of Python."""
Prompts = Batch
"""Left-padded prompts as data.batches.prompt_batches yields them: `tokens_BT`, `segment_ids_BT`
and `positions_BT`, [B / n, P] int32. The suffix is T there, as in every batch."""


class Rollout(TypedDict):
    """Sampled responses behind their prompts. Responses to one prompt are neighbouring rows."""

    tokens_BT: Array
    """[B, P + R] int32."""
    segment_ids_BT: Array
    """1 for real tokens, 0 for padding, int32."""
    positions_BT: Array
    """0 at the first real token, int32."""
    response_BR: Array
    """The last R columns of `tokens_BT`."""
    mask_BR: Array
    """1 for the tokens that the policy drew, the end-of-turn token included; float32."""
    sampler_logp_BR: Array
    """The sampler's log-probabilities at the sampling temperature, in nats; 0 where masked."""


Score = Callable[[Rollout, list[Record]], tuple[Batch, Batch]]
"""score(rollout, records) -> ({reward: scores [B]}, {reward: scalars [B, R + 1]}): the score of
rewards.scorer.make_reward_scorer with its models given."""
Targets = Callable[..., tuple[Any, Metrics]]
"""compute_targets(policy, reference, rollout, scores, scalars) -> (batch to learn on, metrics);
train_grpo.make_advantages and train_raft.make_targets make one."""


# Folded into an iteration's key for the order of its minibatches.
SHUFFLE = 2**31 - 1

# --- sampling


def make_rollout(
    apply: Apply,
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    eos: Ends,
    pad: int,
    n: int = 1,
    tensor: int | None = None,
    in_stages: bool = True,
) -> Callable[[Params, Prompts, Array], Rollout]:
    """Compile rollout(params, prompts, key) -> Rollout: sample `n` responses to each prompt.

    `apply`, `params`: of a LanguageModel of shape `config`, whole, perhaps with adapters.
    `prompts`: Prompts on the current mesh, as is the Rollout: `n` rows to each, in order, R =
    `sampling.max_new_tokens`. `eos`: ids that end a response; `pad`: id of padding. `tensor`:
    devices that cut weights meanwhile, as `check_rollout` allows (unchecked here); None: the
    mesh's. `in_stages`: decode fewer rows where many have ended (stages_of). Nothing is donated.
    """
    # Each device along tensor has a key/value head; where these are fewer, they are copied.
    copies = 1
    if tensor is not None:
        apply, config, copies = with_head_each(apply, config, tensor)

    def rollout(params: Params, prompts: Prompts, key: Array) -> Rollout:
        # Weights are gathered once, not for each token.
        params = gathered(params, config.compute_dtype)
        count, width = prompts["tokens_BT"].shape
        stages = stages_of(count * n, width, sampling.max_new_tokens) if in_stages else None
        samples = generate(
            apply, config, params, prompts, key, sampling, eos=eos, pad=pad, n=n, stages=stages
        )
        batch = {**join_responses(prompts, samples), "sampler_logp_BR": samples.logp_BR}
        # Otherwise XLA decides how rollouts lie, and may replicate them.
        return jax.tree.map(constrain_batch, batch)

    if tensor is None:
        return jax.jit(rollout)
    # With weights that lie otherwise; what is sampled lies as a batch of training does.
    mesh = jax.sharding.get_mesh()
    sample = jax.jit(rollout, out_shardings=NamedSharding(mesh, BATCH))
    return WideRollout(mesh, with_wider_tensor(mesh, tensor), config, copies, sample)


# --- sampling with weights that are cut further than in training


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the policy's weights lie while responses are sampled."""

    tensor: int | None = None
    """Devices over which heads and hidden units are split while sampling: a multiple of
    --mesh.tensor that divides tensor x fsdp; None: --mesh.tensor."""


def check_rollout(config: RolloutConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Raise UserError where weights of a `model` cannot be cut over `config.tensor` of `mesh`.

    A `config.tensor` of None passes. Otherwise it must be a multiple of the mesh's tensor that
    divides tensor x fsdp, and divide the model's heads and `mlp_width` (its experts, where it has
    them), and divide its key/value heads or be a multiple of them; and the mesh's sequence, if it
    has that axis, must be 1.
    """
    if config.tensor is None:
        return
    given = f"--rollout.tensor={config.tensor}"
    # Devices: whole groups of tensor, of one copy of the parameters.
    tensor = mesh.shape["tensor"]
    most = tensor * mesh.shape["fsdp"]
    multiple = config.tensor > 0 and config.tensor % tensor == 0
    require(
        multiple and most % config.tensor == 0,
        f"{given}: must be a multiple of --mesh.tensor={tensor} that divides tensor x fsdp = "
        f"{most}",
    )
    sequence = along(mesh, "sequence")
    require(sequence == 1, f"{given}: not with --mesh.sequence={sequence}; leave one out")

    # What is cut: all but norms, and a vocabulary that does not divide, as on any mesh.
    # Experts are dealt out whole.
    for name in ("heads", "experts" if model.experts else "mlp_width"):
        size = getattr(model, name)
        require(size % config.tensor == 0, f"{given}: must divide --model.{name}={size}")
    kv_heads = model.kv_heads
    require(
        kv_heads % config.tensor == 0 or config.tensor % kv_heads == 0,
        f"{given}: must divide --model.kv_heads={kv_heads}, or be a multiple of it",
    )


@dataclasses.dataclass(frozen=True)
class WideRollout:
    """A rollout whose weights are cut over more devices than in training; see `make_rollout`.

    Decoding reads all of a device's weights for each token, whatever its rows: with k times as
    many devices along tensor it reads a k-th, for k times as many rows. Neighbours along fsdp join
    tensor for that long.
    """

    training: Mesh
    """The mesh of the parameters and prompts that are given, and of the Rollout."""
    mesh: Mesh
    """The same devices, with a longer tensor axis; current while `sample` runs."""
    model: ModelConfig
    """The policy's shape while sampling: where it has fewer key/value heads than `mesh` has
    devices along tensor, each is copied, and each device has the one that its queries share."""
    copies: int
    """Copies of a key/value head."""
    sample: Callable[[Params, Prompts, Array], Rollout]
    """sample(weights, prompts, key), all on `mesh` by `lay`."""

    def __call__(self, params: Params, prompts: Prompts, key: Array) -> Rollout:
        """Sample; return the Rollout, on `training`. The weights laid for it are then freed."""
        laid = self.lay(params)(params, prompts, key)
        with jax.set_mesh(self.mesh):
            return self.sample(*laid)

    def weights(self, params: Params) -> Params:
        """Return the ShapeDtypeStructs, laid on `mesh`, of `params` as `sample` takes them.

        `params`: arrays or shapes of whole parameters. The tree is like it, with key/value heads
        `copies` times; weights that sharding.RULES cut over fsdp are of the compute type, others
        of their own.
        """
        copied = jax.eval_shape(partial(with_copied_heads, copies=self.copies), params)
        return gathered_shapes(copied, self.mesh, self.model.compute_dtype)

    def lay(self, params: Params) -> Callable[[Params, Prompts, Array], tuple[Any, ...]]:
        """Compile lay(params, prompts, key) -> the three arguments of `sample`, laid on `mesh`.

        `params`: whole parameters, arrays or shapes, of the shapes and types that lay is then
        called with. Its arguments lie on the mesh `training`; prompts [B, P] may be of any shape.
        Nothing is donated.
        """
        weights = self.weights(params)
        places = jax.tree.map(lambda weight: weight.sharding, weights)
        rows = NamedSharding(self.mesh, BATCH)
        everywhere = NamedSharding(self.mesh, P())

        # Cast before they are sent. From each device goes what another lacks, and nothing else.
        def laid(params: Params, prompts: Prompts, key: Array) -> tuple[Any, ...]:
            copied = with_copied_heads(params, self.copies)
            cast = jax.tree.map(lambda x, weight: x.astype(weight.dtype), copied, weights)
            return cast, prompts, key

        return jax.jit(laid, out_shardings=(places, rows, everywhere))


def with_head_each(
    apply: Apply, config: ModelConfig, tensor: int
) -> tuple[Apply, ModelConfig, int]:
    """Return (apply, config, copies): a model with a key/value head for each device of `tensor`.

    `copies`: of each key/value head. It is 1, and `apply` and `config` are as given, where
    `kv_heads` is `tensor` or more. Else `kv_heads` must divide `tensor` (checked by
    `check_rollout`, not here); the new `config` has `tensor` of them, and the new `apply`,
    model.LanguageModel's whatever was given, takes parameters of `with_copied_heads`.
    """
    if config.kv_heads >= tensor:
        return apply, config, 1
    # As many queries share a copy as a device has.
    copies = tensor // config.kv_heads
    wider = dataclasses.replace(config, kv_heads=tensor)
    _, apply = init_and_apply(LanguageModel(wider))
    return apply, wider, copies


def with_copied_heads(params: Params, copies: int) -> Params:
    """Return `params` with each key/value head `copies` times, its copies neighbours.

    They fit a model of `copies` times the `kv_heads`, which computes the same: queries that shared
    a head share its copies. `params`: of a LanguageModel, perhaps with adapters (lora.py), whose
    heads are copied too. With one copy `params` are returned as they are.
    """
    if copies == 1:
        return params

    def copied(path: tuple[Any, ...], leaf: Array) -> Array:
        # k and v, their biases, a norm over all heads, the outputs of adapters: [..., K, H].
        is_by_head = re.search(r"attention/[kv](_bias|_b|_heads_norm(_bias)?)?$", path_name(path))
        return jnp.repeat(leaf, copies, axis=-2) if is_by_head else leaf

    return jax.tree_util.tree_map_with_path(copied, params)


# --- prompts and responses


def join_responses(prompts: Prompts, samples: Samples) -> Batch:
    """Join prompts [B / n, P] and their responses [B, R] into rows [B, P + R].

    Returns the keys of Rollout but for `sampler_logp_BR`. `samples`: n neighbouring rows a prompt,
    in the order of the prompts; n is B over the number of prompts, each of which is repeated n
    times.
    """
    # Each prompt is repeated for its responses.
    rows = samples.mask_BR.shape[0]
    n = rows // prompts["tokens_BT"].shape[0]
    repeated = {name: jnp.repeat(x, n, axis=0) for name, x in prompts.items()}

    # Positions go on from the prompt's last one; after the end they stay. A hole is no padding:
    # what comes before a token under the mask is real.
    real_BR = jax.lax.cummax(samples.mask_BR, axis=1, reverse=True).astype(jnp.int32)
    last_B1 = repeated["positions_BT"][:, -1:]
    behind = {
        "tokens_BT": samples.response_BR,
        "segment_ids_BT": real_BR,
        "positions_BT": last_B1 + jnp.cumsum(real_BR, axis=1),
    }
    joined = {}
    for name, x in behind.items():
        joined[name] = jnp.concatenate([repeated[name], x], axis=1)
    return {**joined, "response_BR": samples.response_BR, "mask_BR": samples.mask_BR}


# --- what is logged of rollouts


def ended(batch: Mapping[str, Any], eos: Ends) -> Array:
    """Return [B] bool: True where the last token under the mask is an end of turn, one of `eos`.

    Reads `response_BR` and `mask_BR`. A row without a token under the mask is False.
    """
    # Under the mask: the id may be the padding's too. The last: turns in a response end as well.
    is_drawn_BR = batch["mask_BR"] > 0
    is_end_BR = ends(batch["response_BR"], eos) & is_drawn_BR
    return jnp.any(is_end_BR & last_places(is_drawn_BR), axis=1)


def rollout_metrics(
    logp_BR: Array, reference_BR: Array, batch: Mapping[str, Any], eos: Ends
) -> Batch:
    """Summarise a Rollout, `batch`, and log-probabilities of its tokens: float32 scalars by name.

    `logp_BR`, `reference_BR`: the policy's and the reference's log-probabilities of `response_BR`,
    in nats, at the sampling temperature. Means over responses, empty ones too: kl (k1), kl_k3:
    estimates of KL(policy || reference), in nats a response; length, in tokens; ended, the share
    that `ended`. Means over all tokens under the mask, outside which nothing counts: entropy, an
    estimate by minus `logp_BR`, in nats; repeats, the share of tokens equal to the one before, a
    response's first left out; sampler_gap_mean, of the absolute difference between
    `sampler_logp_BR` and `logp_BR`; sampler_k3, KL(sampler || `logp_BR`), in nats. sampler_gap:
    the largest difference.
    """
    mask_BR = batch["mask_BR"]

    # Over the tokens of a response: KL by two estimates, and its length.
    kl_B = kl_estimate(logp_BR, reference_BR, "k1", mask_BR).sum(1)
    kl_k3_B = kl_estimate(logp_BR, reference_BR, "k3", mask_BR).sum(1)
    length_B = mask_BR.sum(1)

    # Tokens equal to the one before.
    response_BR = batch["response_BR"]
    later_BR = response_BR[:, 1:]
    is_repeat_BR = later_BR == response_BR[:, :-1]

    # Sampling and training compute the same log-probabilities by different programs.
    sampler_BR = batch["sampler_logp_BR"]
    gap_BR = masked(jnp.abs(logp_BR - sampler_BR), mask_BR)
    sampler_k3_BR = kl_estimate(sampler_BR, logp_BR, "k3", mask_BR)
    return {
        "kl": kl_B.mean(),
        "kl_k3": kl_k3_B.mean(),
        "entropy": -masked_mean(logp_BR, mask_BR),
        "length": length_B.mean(),
        "ended": ended(batch, eos).mean(),
        "repeats": masked_mean(is_repeat_BR, mask_BR[:, 1:]),
        "sampler_gap": jnp.max(gap_BR),
        "sampler_gap_mean": masked_mean(gap_BR, mask_BR),
        "sampler_k3": masked_mean(sampler_k3_BR, mask_BR),
    }


@jax.jit
def mean_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Return the mean of each metric over an iteration's updates; of integer counters the last.

    `updates`: metrics, {name: scalar on the device}, of train_step.make_train_step's step; one or
    more, with the same names. Where one value is not finite, neither is the mean. Does not wait
    for the device.
    """

    def mean_of(*values: Array) -> Array:
        # Counters, such as `skipped`, are integers and grow.
        if jnp.issubdtype(values[-1].dtype, jnp.integer):
            return values[-1]
        return jnp.stack(values).mean()

    return jax.tree.map(mean_of, *updates)


def named(**parts: Mapping[str, Any]) -> Metrics:
    """Join metrics under their part's name: named(policy={"loss": x}) is {"policy/loss": x}."""
    joined: Metrics = {}
    for part, metrics in parts.items():
        for name, value in metrics.items():
            joined[f"{part}/{name}"] = value
    return joined


def sample_rows(
    records: list[Record], response_BR: Array, tokenizer: Tokenizer, n: int
) -> list[SampleRow]:
    """Return {"prompt": text, "response": text} for each of `records`, for samples.md.

    The prompt is its last message, or the raw text; the response is the first of its `n`, without
    control tokens and padding. `response_BR`: token ids of the rollout, over all hosts, `n`
    neighbouring rows a prompt. `records`: of this host's prompts, in order, of the schema
    `prompt`. Waits for the device. All processes must call it; the rows are right on the first
    alone.
    """
    # This host's rows are the first of all only on the first host.
    firsts = to_host(response_BR)[::n][: len(records)]
    rows = []
    for record, tokens in zip(records, firsts, strict=True):
        prompt = record["text"] if "text" in record else record["prompt"][-1]["content"]
        response = tokenizer.decode(tokens.tolist())
        rows.append({"prompt": prompt, "response": response})
    return rows


# --- an iteration of a method without a critic: sample, score, compute advantages, again


class Shown(NamedTuple):
    """The prompts and responses of a rollout, for `sample_rows`."""

    records: list[Record]
    """Records of this host's prompts."""
    response_BR: Array
    """Token ids over all hosts, the rollout's."""


def make_experience(
    prompts: Batches,
    rollout: Callable[[Params, Prompts, Array], Rollout],
    score: Score,
    compute_targets: Targets,
    *,
    mesh: Mesh,
    pad: int,
    prompt_length: int,
    group: int,
    max_rounds: int = 1,
) -> Callable[[Params, Params, Array], tuple[Batch, Metrics, Shown]]:
    """Make experience(policy, reference, key) -> (batch, metrics, shown): sample and score.

    It runs rounds. A round takes the next batch of `prompts`, samples with `rollout`
    (`make_rollout`) by a key of its own, scores, and calls `compute_targets(policy, reference,
    rollout, scores, scalars)` for what to learn from, arrays [B, ...] with a `mask_BR`, and its
    metrics, scalars. Groups of `group` neighbouring rows, the rollout's `n`, whose mask is empty
    are replaced by those of further rounds (`refill_groups`; what is too many is dropped). Rounds
    end where every row has a usable token, and after `max_rounds`; then empty groups remain. So
    mask whole groups or none: a single empty row is not replaced, and has all rounds run.

    Prompts, of at most `prompt_length` tokens (else ValueError), are padded on the left, with the
    id `pad`, to that length, so that all rounds have one shape. `policy`, `reference`: whole
    parameters of language models. Metrics: means of a round's over the rounds; `rounds`, a float;
    and `kept`, the share of the rows of `batch` with a usable token, on the device. `shown`: a
    Shown of the last round, replaced or not. Waits for the device in each round. Every process
    must call it.
    """
    refill = jax.jit(partial(refill_groups, group=group))

    def mean_of(*values: Any) -> Any:
        return sum(values) / len(values)

    def experience(policy: Params, reference: Params, key: Array) -> tuple[Batch, Metrics, Shown]:
        batch: Batch = {}
        rounds = []
        for number in range(max_rounds):
            # Sample, score, and compute what to learn from.
            prompt_batch = widened(next(prompts), prompt_length, pad)
            round_key = jax.random.fold_in(key, number)
            sampled = rollout(policy, to_mesh(prompt_batch, mesh), round_key)
            judged = unpadded(sampled, sizes=OF_ROLLOUTS)
            scores, scalars = score(judged, prompts.records)
            targets, metrics = compute_targets(policy, reference, judged, scores, scalars)
            targets = with_room(targets, None)
            rounds.append(metrics)

            # Fill the places of groups without signal.
            batch = refill(batch, targets) if batch else targets
            is_usable_B = batch["mask_BR"].any(1)
            kept = is_usable_B.mean()
            # The comparison waits for the device: only where another round may follow.
            if number + 1 < max_rounds and kept == 1:
                break
        # Means over the rounds.
        means = jax.tree.map(mean_of, *rounds)
        metrics = {**means, "rounds": float(len(rounds)), "kept": kept}
        return batch, metrics, Shown(prompts.records, sampled["response_BR"])

    return experience


def widened(batch: dict[str, np.ndarray], length: int, pad: int) -> dict[str, np.ndarray]:
    """Pad prompts [B, T] on the left to [B, `length`]: `tokens_BT` with `pad`, the rest with 0.

    `batch`: NumPy arrays by the names of `Prompts`; `pad`: an id; T is at most `length`
    (ValueError otherwise).
    """
    # Columns in front of each row; segment id 0 says that they are padding.
    missing = length - batch["tokens_BT"].shape[1]
    wide = {}
    for name, x in batch.items():
        fill = pad if name == "tokens_BT" else 0
        wide[name] = np.pad(x, ((0, 0), (missing, 0)), constant_values=fill)
    return wide


def refill_groups(pool: Batch, fresh: Batch, group: int) -> Batch:
    """Return `pool` with masked-out groups replaced by unmasked ones of `fresh` (DAPO, eq. 11).

    Both have the same keys and shapes, [B, ...] each, as has the result, `mask_BR` among them, and
    `group`, a Python int that divides B, neighbouring rows a prompt. A group is masked out where
    its mask is all 0. Groups of `pool` that are left come first, then those of `fresh`, in order,
    as many as there are places; where these are too few, masked-out groups remain, last.
    """
    # The groups of both, those of `pool` first.
    both = {}
    for name, x in pool.items():
        both[name] = jnp.concatenate([x, fresh[name]])

    # Groups with a usable token come first, otherwise in order; the first half of them are kept.
    mask_BR = both["mask_BR"]
    by_group = mask_BR.reshape(-1, group * mask_BR.shape[1])
    useful_Q = by_group.any(1)
    order_Q = jnp.argsort(~useful_Q, stable=True)
    kept_Q = order_Q[: useful_Q.size // 2]

    # Their rows, `group` neighbours each.
    rows_QC = kept_Q[:, None] * group + jnp.arange(group)
    rows_B = rows_QC.reshape(-1)
    return {name: x[rows_B] for name, x in both.items()}


# --- updates


@partial(jax.jit, static_argnames="parts")
def shuffled(
    batch: Mapping[str, Any], key: Array, parts: int, is_fresh: bool = False
) -> list[Batch]:
    """Cut the rows of `batch`, in random order, into `parts` minibatches of B / parts rows.

    `batch`: arrays [B, ...] by name, no `room`; `parts`, static, must divide B (ValueError). The
    minibatches have its keys and `is_first_B`, bool, True in all rows of the first if `is_fresh`.
    """
    # One order for all arrays of the batch.
    rows = jax.tree.leaves(batch)[0].shape[0]
    order_B = jax.random.permutation(key, rows)
    is_first_B = (jnp.arange(rows) < rows // parts) & is_fresh

    # Each array is cut, and its parts dealt to the minibatches.
    mixed = {name: x[order_B] for name, x in batch.items()}
    minibatches: list[Batch] = [{} for _ in range(parts)]
    for name, x in {**mixed, "is_first_B": is_first_B}.items():
        for minibatch, part in zip(minibatches, jnp.split(x, parts), strict=True):
            minibatch[name] = constrain_batch(part)
    return minibatches


def shuffled_minibatches(
    batch: Mapping[str, Any], key: Array, epochs: int, parts: int, microbatches: int = 1
) -> Iterator[Batch]:
    """Yield the `parts` minibatches of each epoch, every epoch in another random order.

    They are those of `shuffled`, `epochs` x `parts` in all, `is_fresh` in the first epoch. `batch`
    has what `model_inputs` reads; where packing its real tokens saves rows all have one `room`
    (`find_room`, by a cut into `microbatches`), else none. `key`: the iteration's; sampling may
    have it too. The first `next` waits for the device. Every process must call it.
    """
    # A number that no row has: else an epoch's order would come of the bits of a row's tokens.
    batch = with_room(batch, None)
    own_key = jax.random.fold_in(key, SHUFFLE)
    keys = [jax.random.fold_in(own_key, epoch) for epoch in range(epochs)]

    # One room for all minibatches, so that their updates are one program.
    read = model_inputs(batch)
    cut = [part for key in keys for part in shuffled(read, key, parts)]
    room = find_room(*cut, microbatches=microbatches)

    for epoch, epoch_key in enumerate(keys):
        for minibatch in shuffled(batch, epoch_key, parts, epoch == 0):
            yield with_room(minibatch, room)


def check_first_update(
    update: Metrics, metrics: Metrics, dtype: jnp.dtype, start: int, int8: bool = False
) -> None:
    """Assert that an update began at the policy that sampled: ratio 1, and all of `check_sampler`.

    Call it once per start, after the first update; it waits for the device. `update`: that step's
    metrics, of the parameters before it, so policy and old policy were equal: `clipped` must be 0,
    and `approx_kl` below 1e-9 in float32, else 1e-3: a product over other rows may be rounded
    otherwise. The rest: see `check_sampler`. Raises AssertionError: a breach is a bug.
    """
    # Policy and old policy are the same parameters: no token's ratio may have moved.
    changed = float(update["approx_kl"])
    limit = 1e-9 if dtype == jnp.float32 else 1e-3
    assert changed < limit, f"ratio is not 1: mean square log ratio {2 * changed}"

    # Nor may any be outside the clips, in any type (`is_first_B`).
    clipped = float(update["clipped"])
    assert clipped == 0, f"clipped of the first update is {clipped}"
    check_sampler(metrics, dtype, start, int8)


def check_sampler(metrics: Metrics, dtype: jnp.dtype, start: int, int8: bool = False) -> None:
    """Assert that sampler and training agree on log-probabilities, and that a new run has KL 0.

    Call it once per start, with the first rollout, before any update; it waits for the device.
    `metrics`: of `rollout_metrics`. Where `dtype`, the compute type, is float32 and the sampler's
    is not `int8`, `sampler_gap` must be below 1e-4 nats; in a new run, where `start`, the steps
    done before, is 0, `kl` within `start_tolerance` of 0. Raises AssertionError.
    """
    # In a new run policy and reference are the same parameters.
    kl = float(metrics["kl"])
    assert start > 0 or abs(kl) < start_tolerance(dtype), f"KL to the reference starts at {kl}"

    # Decoding and training are two programs for one computation, but for rounded weights.
    exact = dtype == jnp.float32 and not int8
    gap = float(metrics["sampler_gap"])
    assert gap < 1e-4 or not exact, f"sampler and trainer disagree by {gap} nats"


def start_tolerance(dtype: jnp.dtype) -> float:
    """Return how far from 0 a new run's KL may be, in nats a response: 1e-4 in float32, else 1e-2.

    `dtype`: the model's compute type.
    """
    return 1e-4 if dtype == jnp.float32 else 1e-2


def check_kl(metrics: Mapping[str, float], limit: float) -> None:
    """Raise UserError where the newest `kl`, in nats a response, is above `limit` (inf: never).

    `metrics`: a row of metrics; with a nan, or without a `kl`, as before the first row, it passes.
    """
    # A policy this far from the reference has found text that only the reward likes.
    kl = metrics.get("kl", 0.0)
    if kl > limit:
        raise UserError(f"--kl_limit={limit}: KL reached {kl:.1f} nats; raise --kl_coef")
