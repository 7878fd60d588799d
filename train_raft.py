"""Sample, rank, imitate in rounds, on the policy's own responses: raft, rejection, rft, expert.

    python train_raft.py --init=runs/align/sft --reward=runs/align/rm --run=runs/raft
    python train_raft.py --method=expert --threshold=1 --data=sums.jsonl \\
        --reward=tasks.answers:number --run=runs/sums

A method is an entry of PAPERS in objectives/imitate.py, where its mathematics is: it sets fields.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.bad_rows import OnBadRow
from data.batches import Batches, prompt_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, lora_base, trainable_part, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import imitate
from objectives.imitate import Pool
from objectives.policy import MissingEos, missing_eos, response_logprobs
from objectives.unpadded import find_room, with_room
from planning.dry_run import preview_items
from planning.memory import check_memory
from rewards.scorer import check_missing_eos, make_reward_scorer
from rollout import (
    Batch,
    Metrics,
    Rollout,
    RolloutConfig,
    Score,
    check_rollout,
    ended,
    make_experience,
    make_rollout,
    mean_metrics,
    named,
    rollout_metrics,
    sample_rows,
)
from runtime import flags
from runtime.errors import require
from runtime.flags import with_paper_defaults
from runtime.guard import GuardConfig, guarded_by_samples
from runtime.hosts import HostsConfig
from sampling import Apply, Ends, SamplingConfig, check_temperature
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    constrain_batch,
    data_shard,
    init_sharded,
    make_mesh,
)
from train_state import Init, as_items, from_items, init_state, pin_inputs, starting_params
from train_step import (
    OptimizerConfig,
    TrainState,
    Update,
    at_place,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from training_run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders and method
    run: str = "runs/raft"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""
    method: Literal["raft", "rejection", "rft", "expert"] = "raft"
    """Fills fields left at None with its paper's values (PAPERS in objectives/imitate.py)."""

    # Rewards and prompts
    reward: str = "runs/align/rm"
    """A run of train_rm.py, module:function called with (response, record), or http://<server>
    (rewards/serve.py)."""
    data: str = "world"
    """Prompts: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""

    # Sizes of a round
    steps: int = 10
    """Rounds: sample, rank, imitate."""
    batch_size: int = 1024
    """Responses sampled in a round, over all devices."""
    samples_per_prompt: int | None = None
    """Responses to each prompt of a round."""

    # What is imitated
    select: Literal["best", "top", "above_threshold"] | None = None
    """Responses to imitate. best: the best to each prompt. top: the best 1 / samples_per_prompt of
    all. above_threshold: those whose score is at least --threshold."""
    threshold: float | None = None
    """Least score of a response to imitate (above_threshold)."""
    distinct: bool | None = None
    """Imitate only the first of equal responses to a prompt."""
    replay_rounds: int | None = None
    """Earlier rounds whose responses stay in the pool, to be ranked and imitated again."""

    # Update
    epochs: int = 2
    """Passes over the chosen responses in a round."""
    minibatch_size: int = 64
    """Responses per update; a round's last minibatch is filled up with its first responses."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are summed."""
    kl_coef: float | None = None
    """Beta of KL(reference || policy), over the whole vocabulary at each token."""

    # Sampling
    max_prompt: int = 20
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    missing_eos: MissingEos = "lowest"
    """Rule for a response without an end. lowest: its score is below all of the batch. Else it
    becomes `missing_eos_score` (replace), has it added (penalty), or stays (none)."""
    missing_eos_score: float = -1.0
    """Score of a response without an end (replace), or what is added to it (penalty)."""

    # Model
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-4, schedule="constant", warmup=0, weight_decay=0.0
    )
    """The policy's optimiser; its schedule goes by rounds, however many updates they have."""
    model: ModelConfig = ModelConfig()
    """The policy's architecture; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the policy; the reference is then their base."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    int8: bool = False
    """Sample with weights in int8, half of bfloat16 to read."""
    rollout: RolloutConfig = RolloutConfig()
    """Devices over which the policy is cut while it samples."""
    guard: GuardConfig = GuardConfig()
    """A loss spike, after which other responses are drawn."""
    hosts: HostsConfig = HostsConfig()
    """Processes of this run."""
    seed: int = 0
    """Seed of random weights, the order of the prompts and samples."""
    eval_every: int = 1
    """Rounds between gold evaluations on held-out prompts (world only)."""
    save_every: int = 1
    """Rounds between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""

    @property
    def length(self) -> int:
        """Return the tokens of a row, `max_prompt` + `max_new_tokens`: a property."""
        return self.max_prompt + self.max_new_tokens

    @property
    def pool_rows(self) -> int:
        """Return the rows of the pool, `batch_size` x (1 + `replay_rounds`): a property.

        TypeError where `replay_rounds` is None.
        """
        return self.batch_size * (1 + self.replay_rounds)

    @property
    def most_updates(self) -> int:
        """Return the most updates that a round can have: a property.

        It is `epochs` x M / `minibatch_size`, rounded up, where M is the most responses that can
        be chosen: `pool_rows`, with best and top divided by `samples_per_prompt`. The method's
        fields must be filled (flags.with_paper_defaults).
        """
        # Above a threshold all may be.
        most = self.pool_rows
        if self.select in ("best", "top"):
            most = divided_up(self.pool_rows, self.samples_per_prompt)
        return divided_up(self.epochs * most, self.minibatch_size)

    @property
    def schedule_updates(self) -> int:
        """Return `steps` x `most_updates`, the updates that the schedule is made for: a property.

        The method's fields must be filled (flags.with_paper_defaults).
        """
        return self.steps * self.most_updates

    def place(self, step: int, number: int, count: int) -> int:
        """Return the schedule's place, 0 to `schedule_updates` - 1, at an update of round `step`.

        It is (step - 1) most_updates + ceil((number + 1) most_updates / count) - 1: `step` from 1,
        `number`, the update in the round, from 0, and `count`, the round's updates. So each round
        ends where its part of the schedule does, however few updates it has.
        """
        done = divided_up((number + 1) * self.most_updates, count)
        return (step - 1) * self.most_updates + done - 1


def divided_up(count: int, size: int) -> int:
    """Return count / size, ints, `size` above 0, rounded up to an int."""
    return -(-count // size)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings out of range, and for settings that cannot run together.

    `samples_per_prompt`, at least 1, must divide `batch_size`; `epochs` is at least 1,
    `replay_rounds` and `kl_coef` at least 0; above_threshold needs a `threshold`, which the others
    must not have. Then rewards.scorer.check_missing_eos, check_temperature and check_rollout, and
    sharding.check_batch of a minibatch and of a round's prompts on `mesh`, of `make_mesh`.
    `config`: of runtime.flags.with_paper_defaults, which fills the method's fields (TypeError for
    a None).
    """
    # Sizes.
    group = config.samples_per_prompt
    require(
        group >= 1 and config.batch_size % group == 0,
        f"--samples_per_prompt={group}: must divide --batch_size={config.batch_size}",
    )
    require(config.epochs >= 1, f"--epochs={config.epochs}: must be at least 1")
    require(
        config.replay_rounds >= 0,
        f"--replay_rounds={config.replay_rounds}: must be at least 0",
    )
    require(config.kl_coef >= 0, f"--kl_coef={config.kl_coef}: must be at least 0")

    # A threshold where it is used, and only there.
    by_threshold = config.select == "above_threshold"
    require(
        not by_threshold or config.threshold is not None,
        f"--threshold: give the score to reach; --method={config.method} imitates what passes",
    )
    require(
        by_threshold or config.threshold is None,
        f"--threshold={config.threshold}: unused by --select={config.select}; leave it out or "
        "give --select=above_threshold",
    )

    # A rule for missing ends, and a temperature that a loss can divide by.
    check_missing_eos(config)
    check_temperature(config.temperature)

    # Each part of a batch lies evenly over the devices.
    check_batch("minibatch_size", config.minibatch_size, config.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", config.batch_size // group, 1, mesh)
    check_rollout(config.rollout, config.model, mesh)


class ScoredRollout(Rollout):
    """A rollout and what its responses are ranked by."""

    score_B: jax.Array
    """Float32: the reward after the rule on a missing end; -inf for what is never imitated."""


def make_targets(
    config: Config, apply: Apply, *, eos: Ends
) -> Callable[..., tuple[ScoredRollout, Batch]]:
    """Compile compute_targets(policy, reference, rollout, scores, scalars) -> (scored, metrics).

    `policy`, `reference`: whole parameters that `apply` takes, for the metrics alone: no KL is in
    the score. `rollout`: a Rollout on the mesh. `scores`: {reward: [B]} of
    rewards.scorer.make_reward_scorer, read at the name that --reward gives; `scalars` are not
    read. `eos`: ids that end a response. `scored`: a ScoredRollout; with --missing_eos=lowest a
    response without an end has score -inf in it. Metrics are scalars on the device, means over all
    B: `score`, before the rule on a missing end; `score_with_eos_rule`, after
    objectives.policy.missing_eos, whose finite score counts where `scored` has -inf; and those of
    `rollout_metrics`. Nothing is donated.
    """

    @jax.jit
    def compute_targets(
        policy: Params,
        reference: Params,
        rollout: Rollout,
        scores: Batch,
        scalars: Batch,
    ) -> tuple[ScoredRollout, Batch]:
        # Log-probabilities are for the metrics alone.
        logp_BR = response_logprobs(apply, policy, rollout, config.temperature)
        reference_BR = response_logprobs(apply, reference, rollout, config.temperature)

        # The reward, and the rule for a missing end of turn.
        raw_B = scores[config.reward]
        ended_B = ended(rollout, eos)
        score_B = missing_eos(raw_B, ended_B, config.missing_eos, config.missing_eos_score)
        metrics = {
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        if config.missing_eos == "lowest":
            # A lowest score is not enough: the best of a group without an end would be imitated.
            score_B = jnp.where(ended_B, score_B, -jnp.inf)
        return {**rollout, "score_B": score_B}, metrics

    return compute_targets


class PoolFunctions(NamedTuple):
    """The jitted functions on the pool."""

    add: Callable[[Pool, Any, int], Pool]
    """add(pool, scored rollout, number) -> pool, replicated on the mesh; `number`: rounds before
    this one. See imitate.added."""
    choose: Callable[[Pool], tuple[jax.Array, Batch]]
    """choose(pool) -> (chosen [rows] bool, {chosen: their number, chosen_score: their mean score,
    0 for none, best_score: the best of the pool}), on the device."""
    draw: Callable[[Pool, jax.Array, jax.Array], list[Pool]]
    """draw(pool, chosen, key) -> `most_updates` minibatches of --minibatch_size rows; see
    imitate.drawn."""


def make_pool_functions(config: Config, mesh: jax.sharding.Mesh) -> PoolFunctions:
    """Compile what --select, --distinct and --minibatch_size make of the pool: PoolFunctions.

    `config`: of flags.with_paper_defaults, with no field of the method at None. `mesh`: of
    `make_mesh`. Nothing is donated, and none waits for the device.
    """
    # Which rows are imitated, by their scores.
    group = config.samples_per_prompt
    select = {
        "best": partial(imitate.best_of_n, group=group),
        "top": partial(imitate.top_fraction, one_in=group),
        "above_threshold": partial(imitate.passing, threshold=config.threshold),
    }[config.select]

    @jax.jit
    def choose(pool: Pool) -> tuple[jax.Array, Batch]:
        # By score, then without repetitions.
        score_B = pool["score_B"]
        chosen_B = select(score_B)
        if config.distinct:
            chosen_B &= imitate.first_of_equal(pool["tokens_BT"], group)

        # What is logged of the choice.
        count = chosen_B.sum()
        mean = jnp.where(chosen_B, score_B, 0.0).sum() / jnp.maximum(count, 1)
        return chosen_B, {"chosen": count, "chosen_score": mean, "best_score": score_B.max()}

    @jax.jit
    def draw(pool: Pool, chosen_B: jax.Array, key: jax.Array) -> list[Pool]:
        # As many minibatches as a round can have: one shape, whatever is chosen.
        minibatches = imitate.drawn(
            pool, chosen_B, key, config.most_updates, config.minibatch_size
        )
        return jax.tree.map(constrain_batch, minibatches)

    # Replicated: every device draws from all rows.
    add = jax.jit(imitate.added, out_shardings=NamedSharding(mesh, P()))
    return PoolFunctions(add, choose, draw)


def minibatches_of(
    config: Config,
    functions: PoolFunctions,
    pool: Pool,
    key: jax.Array,
    step: int,
) -> tuple[list[Pool], Batch]:
    """Choose the responses to imitate, cut them into minibatches; return (minibatches, metrics).

    `functions`: of `make_pool_functions`. `pool`: of its `add`, not donated. `key`, a PRNG key,
    gives one random order of the chosen rows; it is repeated --epochs times, end to end, and cut
    into minibatches of --minibatch_size rows. The last alone is filled up, by repeating the order
    again; those rows count as others do. All have one `room` for their real tokens, if packing
    saves any (objectives/unpadded.py). Where nothing was chosen the list is empty, and a note on
    stderr names the round, `step`, from 1. Metrics, scalars on the device: `chosen`, how many
    responses; `chosen_score`, their mean score, 0 for none; `best_score`, the highest of the pool,
    -inf for none. Waits for the device; all processes must call it.
    """
    # How many were chosen says how many minibatches there are.
    chosen_B, metrics = functions.choose(pool)
    count = int(metrics["chosen"])
    if count == 0:
        note_nothing_chosen(config, step, float(metrics["best_score"]))
        return [], metrics

    # The passes over them; what is drawn beyond is dropped.
    updates = divided_up(config.epochs * count, config.minibatch_size)
    minibatches = functions.draw(pool, chosen_B, key)[:updates]

    # One room for all, so that their updates are one program.
    room = find_room(*minibatches, microbatches=config.microbatches)
    return [with_room(minibatch, room) for minibatch in minibatches], metrics


def note_nothing_chosen(config: Config, step: int, best: float) -> None:
    """Say on stderr, on process 0 alone, that round `step`, from 1, had no response to imitate.

    `best`: the best score of the pool, a float; at -inf the note says that no response had ended,
    else that none reached --threshold.
    """
    # The others would say the same.
    if jax.process_index() != 0:
        return
    reason = f"no response reached --threshold={config.threshold} (the best score was {best:.4g})"
    if best == -math.inf:
        reason = f"no response ended within --max_new_tokens={config.max_new_tokens}"
    print(f"note: round {step}: {reason}: nothing was learnt", file=sys.stderr)


def make_update(config: Config, init: Init, apply: Apply) -> Update:
    """Make the policy's Update: optimiser over `schedule_updates`, loss and jitted step.

    `init`: of the policy, handed through. `apply`: of the policy. Batches are those of
    `minibatches_of`. step(state, batch, base) donates its state alone. Its `base` is never None:
    {"base", "reference"}, the parameters under the policy's adapters (None without LoRA), and the
    reference's whole parameters, with a `kl_coef` of 0 too. `on_all` sets the schedule's place in
    the state before each step.
    """

    # The objective sees two models; only what is trained of the policy has a gradient.
    def both(frozen: Params | None, trained: Params) -> Params:
        assert frozen is not None
        policy = with_adapters(config.lora, frozen["base"], trained)
        return {"policy": policy, "reference": frozen["reference"]}

    # The loss: likelihood of what was chosen, and the pull to the reference.
    objective = partial(imitate.imitation_objective, apply, kl_coef=config.kl_coef)

    # The schedule is made for as many updates as a run can have.
    optimizer = make_optimizer(config.optimizer, config.schedule_updates)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=config.optimizer.clip,
        full=both,
    )
    return Update(init, optimizer, objective, step)


def on_all(
    config: Config,
    update: Update,
    policy: TrainState,
    minibatches: list[Pool],
    frozen: Params,
    step: int,
) -> tuple[TrainState, Metrics]:
    """Update `policy`, which is donated, on each of the minibatches; return (policy, metrics).

    `update`: of `make_update`. `minibatches`: of `minibatches_of` at round `step`, from 1; each
    update is put at its place in the schedule (`config.place`). `frozen`: the step's base,
    {"base", "reference"} as in `make_update`; not donated. Metrics, scalars on the device:
    `policy/NAME`, the plain means of what the updates return, of their counters
    (train_step.COUNTS) the last, and `learning_rate`, that of the last update. Without minibatches
    `policy` is returned as it is, and {}. All processes must call it.
    """
    updates = []
    for number, minibatch in enumerate(minibatches):
        # However many there are, the schedule goes over the round's part of it.
        place = config.place(step, number, len(minibatches))
        policy, metrics = update.step(at_place(policy, place), minibatch, frozen)
        updates.append(metrics)
    # Where nothing was chosen the policy stays as it is.
    if not updates:
        return policy, {}
    rate = make_schedule(config.optimizer, config.schedule_updates)(place)
    return policy, {**named(policy=mean_metrics(updates)), "learning_rate": rate}


def fresh_items(
    config: Config, optimizer: optax.GradientTransformation, pad: int, reference: Params
) -> dict[str, Any]:
    """Build what a checkpoint holds before the first round: the policy's state, an empty pool.

    Keys: `params` and `rest` of the state (train_state.as_items), and `pool`, imitate.empty_pool
    of `pool_rows` rows. `optimizer`: the Update's, of `make_update`. `pad`: the id of padding.
    `reference`: whole parameters to start from, which are copied, for the step donates its own;
    with LoRA the state has new adapters for them instead, random by --seed. sharding.init_sharded
    runs it and lays the result on the mesh.
    """
    # The policy starts as the reference, or as new adapters on it.
    trained = trainable_part(config.lora, reference, jax.random.key(config.seed))
    state = init_state(jax.tree.map(jnp.copy, trained), optimizer)

    # The pool has its full size from the start: one shape for all rounds.
    pool = imitate.empty_pool(config.pool_rows, config.max_prompt, config.max_new_tokens, pad)
    return {**as_items(state), "pool": pool}


def open_prompts(
    config: Config, source: Source, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Batches:
    """Open endless batches of prompts, --batch_size / --samples_per_prompt of them over all hosts.

    `source`: records of the schema `prompt`, of which this host reads its part, in an order by
    --seed. Batches are NumPy arrays, padded on the left (data.batches.prompt_batches); prompts are
    cut on the left to --max_prompt tokens, and the width is at most that. `.records` are those of
    the last batch, one a prompt. `config`: of flags.with_paper_defaults, with no field of the
    method at None.
    """
    # Every host reads its own part, in an order that the seed gives.
    shard: dict[str, Any] = {"seed": config.seed, **data_shard(mesh)}
    groups = config.batch_size // config.samples_per_prompt
    return prompt_batches(source, tokenizer, batch_size=groups, length=config.max_prompt, **shard)


def load_score(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Score:
    """Load the reward; return score(rollout, records) -> ({reward: [B]}, {reward: [B, R + 1]}).

    The key `reward` is what --reward says. score takes a Rollout on the mesh, and a record for
    each of this host's prompts, in order, not for each response. The first dict has the score of
    each response, of all hosts. The second is {} for a function or a server; for a reward model,
    whose score is its scalar at the response's last token, it has the scalars at the prompt's last
    token and at the response's R, which mean nothing at padding. All arrays are on the mesh, as
    the model stays. All processes must call load_score and score; for a function or a server score
    waits for the device, and raises UserError where it returns no finite number.

    Raises UserError for a reward that cannot be loaded or reached, and for a model of steps.
    """
    # The model stays on the mesh: it is given once for all.
    reward_models, score = make_reward_scorer([config.reward], tokenizer, mesh)
    return partial(score, reward_models)


@guarded_by_samples
def main(config: Config) -> dict[str, float]:
    """Train a policy by --method, in rounds; return the last row of metrics, {name: float}.

    Returns {} where no step ran: in a dry run, and where --run has done its --steps already. Fills
    the method's fields that are None. `config`: of flags.parse, which takes `model` from the run
    --init; in one made by hand it must be that run's. Checkpoints, metrics.jsonl and samples go
    into --run. All processes must call it. Raises UserError for settings or files that do not fit.
    """
    # What the paper sets, and a mesh of all devices.
    config = with_paper_defaults(config, config.method, imitate.PAPERS[config.method])
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    check_memory(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length)

    # Data: prompts. The models: the policy starts as a copy of the reference.
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = open_prompts(config, source, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    frozen = {"base": lora_base(config.lora, reference), "reference": reference}

    # The parts of a round: sample and score, the pool, the update. With LoRA the state holds
    # adapters alone, and `full` lays them on their base.
    experience_of = make_experience(
        prompts,
        rollout=make_rollout(
            apply,
            config.model,
            SamplingConfig(
                config.temperature, max_new_tokens=config.max_new_tokens, int8=config.int8
            ),
            eos=tokenizer.ends,
            pad=tokenizer.pad,
            n=config.samples_per_prompt,
            tensor=config.rollout.tensor,
        ),
        score=load_score(config, tokenizer, mesh),
        compute_targets=make_targets(config, apply, eos=tokenizer.ends),
        mesh=mesh,
        pad=tokenizer.pad,
        prompt_length=config.max_prompt,
        group=config.samples_per_prompt,
    )
    functions = make_pool_functions(config, mesh)
    update = make_update(config, init, apply)
    full = partial(with_adapters, config.lora, frozen["base"])
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every > 0:
        evaluate_gold = make_gold_evaluation(config, tokenizer)

    # What a checkpoint holds: the policy's state and the pool.
    fresh = partial(fresh_items, config, update.optimizer, tokenizer.pad)
    shapes = abstract(jax.eval_shape(fresh, reference), mesh)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        items = {**shapes, "held": reference}
        return preview_items(config, items, prompts, tokenizer)

    with Run(config, tokenizer, unit="round", guard=config.guard) as run:
        # The state and the pool of the newest checkpoint, or of a new run.
        items = run.restore(shapes, prompts) or init_sharded(fresh, mesh, reference)
        policy = from_items(items)
        pool = items["pool"]
        run.describe(
            f"{config.method} on {source.name}",
            policy.params,
            (policy.opt_state, reference),
            length=config.length,
        )
        for step in run.steps():
            # 1. Sample responses and score them; they take the place of the pool's oldest.
            key = run.key(step)
            rollout, metrics, shown = experience_of(full(policy.params), reference, key)
            pool = functions.add(pool, rollout, step - 1)

            # 2. Rank the pool, and choose what to imitate.
            draw_key = jax.random.fold_in(key, 2)
            minibatches, of_chosen = minibatches_of(config, functions, pool, draw_key, step)

            # 3. Imitate: supervised fine-tuning on it.
            policy, of_updates = on_all(config, update, policy, minibatches, frozen, step)
            metrics |= {**of_chosen, **of_updates, "updates": len(minibatches)}
            run.record(step, metrics, tokens=config.batch_size * config.length)

            # 4. Samples, the gold evaluation and a checkpoint, when they are due.
            if run.due(step, config.eval_every):
                run.samples(step, sample_rows(*shown, tokenizer, config.samples_per_prompt)[:8])
                if evaluate_gold is not None:
                    run.record(step, evaluate_gold(full(policy.params), reference))
            run.save_when_due(step, {**as_items(policy), "pool": pool}, prompts)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
