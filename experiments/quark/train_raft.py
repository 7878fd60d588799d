"""Quark: sample, rank, imitate all, each response after a turn that names its reward's quantile.

    PYTHONPATH=. python experiments/quark/train_raft.py --init=runs/align/sft \\
        --reward=runs/align/rm --run=runs/quark

Lu et al. 2022. A fork of train_raft.py; its mathematics is in quark.py. What a policy has learnt
is asked for by a system turn: its best quantile, such as `5`.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.bad_rows import OnBadRow
from data.batches import Batches, prompt_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from experiments.quark.gold import make_asking_gold_evaluation
from experiments.quark.quark import (
    ADDED,
    conditioned,
    make_asking_rollout,
    quantiles,
    quark_objective,
)
from lora import LoraConfig, lora_base, trainable_part, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import imitate
from objectives.imitate import Pool
from objectives.policy import MissingEos, missing_eos, response_logprobs
from planning.dry_run import preview_items
from rewards.scorer import check_missing_eos, make_reward_scorer
from rollout import (
    Batch,
    Metrics,
    Rollout,
    Score,
    Shown,
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
from runtime.hosts import HostsConfig
from sampling import Apply, Ends, SamplingConfig
from sharding import (
    MeshConfig,
    abstract,
    check_batch,
    constrain_batch,
    data_shard,
    init_sharded,
    make_mesh,
)
from train_state import as_items, from_items, init_state, pin_inputs, starting_params
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
    # Folders
    run: str = "runs/quark"
    """Folder of this run; running again resumes it."""
    init: str = "runs/align/sft"
    """Run that policy and reference start from."""

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
    samples_per_prompt: int = 1
    """Responses to each prompt of a round."""

    # What is imitated
    quantiles: int = 5
    """Parts into which the pool is cut, 2..9; from the second round on the last is asked for."""
    replay_rounds: int = 4
    """Earlier rounds whose responses stay in the pool, to be ranked and imitated again."""

    # Update
    epochs: int = 2
    """Passes over the pool in a round."""
    minibatch_size: int = 64
    """Responses per update; a round's last minibatch is filled up with its first responses."""
    microbatches: int = 1
    """Parts of a minibatch whose gradients are summed."""
    kl_coef: float = 0.05
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
    """The policy's optimiser."""
    model: ModelConfig = ModelConfig()
    """The policy's architecture; taken from --init."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the policy; the reference is then their base."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
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
        """Return the tokens of a row: prompt and response."""
        return self.max_prompt + self.max_new_tokens

    @property
    def pool_rows(self) -> int:
        """Return how many responses the pool holds: of this round and of those before."""
        return self.batch_size * (1 + self.replay_rounds)

    @property
    def most_updates(self) -> int:
        """Updates of a round whose pool is full."""
        return divided_up(self.epochs * self.pool_rows, self.minibatch_size)

    @property
    def schedule_updates(self) -> int:
        """Return the updates of a run whose every round has as many as it can."""
        return self.steps * self.most_updates

    def place(self, step: int, number: int, count: int) -> int:
        """Return where the schedule is at update `number`, from 0, of the `count` of round `step`.

        Of `schedule_updates`. A round with fewer updates than it can have takes longer steps, so
        that each round, and so the run, ends where the schedule does.
        """
        done = divided_up((number + 1) * self.most_updates, count)
        return (step - 1) * self.most_updates + done - 1


def divided_up(count: int, size: int) -> int:
    """Return count / size, rounded up."""
    return -(-count // size)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for settings that cannot run together."""
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
    require(2 <= config.quantiles <= 9, f"--quantiles={config.quantiles}: must be in 2..9")
    check_missing_eos(config)
    check_batch("minibatch_size", config.minibatch_size, config.microbatches, mesh)
    check_batch("batch_size / --samples_per_prompt", config.batch_size // group, 1, mesh)


def quantile_words(config: Config, tokenizer: Tokenizer) -> jax.Array:
    """Return the token of each quantile's number, [quantiles + 1]; index 0 is of no quantile.

    Raises UserError where the tokenizer has no system turn, or no single token for a number.
    """
    words = [tokenizer.encode(str(number)) for number in range(config.quantiles + 1)]
    single = all(len(word) == 1 for word in words)
    require(
        tokenizer.system is not None and single,
        f"--init={config.init}: quantiles need a tokenizer with <|system|> and one token for a "
        "digit",
    )
    return jnp.array([word[0] for word in words], jnp.int32)


class ScoredRollout(Rollout):
    """A rollout and what its responses are ranked by."""

    score_B: jax.Array
    """The reward, after the rule on a missing end; float32, -inf for what is never imitated."""


def make_targets(
    config: Config, apply: Apply, *, eos: Ends, asking: Callable[[Rollout], Batch]
) -> Callable[..., tuple[ScoredRollout, Batch]]:
    """Compile compute_targets(policy, reference, rollout, scores, scalars).

    It returns (scored rollout, metrics). `asking(rollout)` makes the rows as the policy saw them;
    the reference sees them as they are. `scores`: {reward: [B]} of make_reward_scorer,
    whose scalars are not used. `eos` ends a response. Metrics are scalars: means over the rollout.
    """

    @jax.jit
    def compute_targets(
        policy: Params,
        reference: Params,
        rollout: Rollout,
        scores: Batch,
        scalars: Batch,
    ) -> tuple[ScoredRollout, Batch]:
        seen = {**rollout, **asking(rollout)}
        logp_BR = response_logprobs(apply, policy, seen, config.temperature)
        reference_BR = response_logprobs(apply, reference, rollout, config.temperature)
        raw_B = scores[config.reward]
        ended_B = ended(rollout, eos)
        score_B = missing_eos(raw_B, ended_B, config.missing_eos, config.missing_eos_score)
        metrics = {
            "score": raw_B.mean(),
            "score_with_eos_rule": score_B.mean(),
            **rollout_metrics(logp_BR, reference_BR, rollout, eos),
        }
        if config.missing_eos == "lowest":
            # Where few end, the best quantile would hold what did not.
            score_B = jnp.where(ended_B, score_B, -jnp.inf)
        return {**rollout, "score_B": score_B}, metrics

    return compute_targets


class PoolFunctions(NamedTuple):
    """The jitted functions on the pool."""

    add: Callable[[Pool, Any, int], Pool]
    """add(pool, scored rollout, number) -> pool; see imitate.added. The pool is replicated."""
    choose: Callable[[Pool, jax.Array], tuple[Pool, jax.Array, Batch]]
    """choose(pool, key) -> (pool with `word_B`, the token of each row's quantile; chosen [rows]
    bool; {chosen: their number, chosen_score: their mean score, best_score: the pool's best})."""
    draw: Callable[[Pool, jax.Array, jax.Array], list[Pool]]
    """draw(pool, chosen, key) -> `most_updates` minibatches; see imitate.drawn."""


def make_pool_functions(
    config: Config, mesh: jax.sharding.Mesh, words: jax.Array
) -> PoolFunctions:
    """Compile the functions on the pool; `words` are those of quantile_words."""

    @jax.jit
    def choose(pool: Pool, key: jax.Array) -> tuple[Pool, jax.Array, Batch]:
        score_B = pool["score_B"]
        chosen_B = imitate.filled(score_B)
        ranked = {**pool, "word_B": words[quantiles(score_B, config.quantiles, key)]}
        count = chosen_B.sum()
        mean = jnp.where(chosen_B, score_B, 0.0).sum() / jnp.maximum(count, 1)
        metrics = {"chosen": count, "chosen_score": mean, "best_score": score_B.max()}
        return ranked, chosen_B, metrics

    @jax.jit
    def draw(pool: Pool, chosen_B: jax.Array, key: jax.Array) -> list[Pool]:
        # As many minibatches as a round can have: one shape, whatever is chosen.
        minibatches = imitate.drawn(
            pool, chosen_B, key, config.most_updates, config.minibatch_size
        )
        return jax.tree.map(constrain_batch, minibatches)

    add = jax.jit(imitate.added, out_shardings=NamedSharding(mesh, P()))
    return PoolFunctions(add, choose, draw)


def minibatches_of(
    config: Config, functions: PoolFunctions, pool: Pool, key: jax.Array
) -> tuple[list[Pool], Batch]:
    """Rank the pool; return `epochs` passes over it in minibatches, and choose's metrics.

    Waits for the device, once a round.
    """
    ranked, chosen_B, metrics = functions.choose(pool, jax.random.fold_in(key, 1))
    updates = divided_up(config.epochs * int(metrics["chosen"]), config.minibatch_size)
    return functions.draw(ranked, chosen_B, jax.random.fold_in(key, 2))[:updates], metrics


def make_update(config: Config, init: Any, apply: Apply, system: int) -> Update:
    """Make the policy's optimiser over the most updates of a run, and its jitted step.

    The step's `base` is {"base", "reference"}: what lies under the policy's adapters, or None, and
    the reference; `system` is the token that begins a system turn.
    """

    # The objective sees two models; only what is trained of the policy has a gradient.
    def both(frozen: Params | None, trained: Params) -> Params:
        assert frozen is not None
        policy = with_adapters(config.lora, frozen["base"], trained)
        return {"policy": policy, "reference": frozen["reference"]}

    objective = partial(quark_objective, apply, system=system, kl_coef=config.kl_coef)
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
    """Update `policy`, which is donated, on each of round `step`'s minibatches; return it.

    With the means of the updates' metrics as `policy/NAME`, and the `learning_rate` of the last;
    {} where there are no minibatches. `frozen`: the step's base.
    """
    updates = []
    for number, minibatch in enumerate(minibatches):
        # However many there are, the schedule goes over the round's part of it.
        place = config.place(step, number, len(minibatches))
        policy, metrics = update.step(at_place(policy, place), minibatch, frozen)
        updates.append(metrics)
    if not updates:
        return policy, {}
    rate = make_schedule(config.optimizer, config.schedule_updates)(place)
    return policy, {**named(policy=mean_metrics(updates)), "learning_rate": rate}


def fresh_items(
    config: Config, optimizer: optax.GradientTransformation, pad: int, reference: Params
) -> dict[str, Any]:
    """Build what a checkpoint holds before the first round: the policy's state, an empty pool.

    Keys: `params` and `rest` of the state (train_state.as_items), and `pool`. `pad`: the id of
    padding. Parameters of `reference` are copied: the step donates its own, and the reference
    stays.
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
    """Open batches of one prompt a group, on this host's part of `source`.

    `source`: records of the schema `prompt`. Left-padded; `.records` are those of the last batch's
    prompts.
    """
    # Every host reads its own part, in an order that the seed gives.
    shard: dict[str, Any] = {"seed": config.seed, **data_shard(mesh)}
    groups = config.batch_size // config.samples_per_prompt
    return prompt_batches(source, tokenizer, batch_size=groups, length=config.max_prompt, **shard)


def load_score(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Score:
    """Load the reward; return score(rollout, records) -> ({reward: [B]}, {reward: [B, R + 1]}).

    As of rewards.scorer.make_reward_scorer with its model given, which stays on the mesh.
    UserError for a reward that cannot be loaded.
    """
    # The model stays on the mesh: it is given once for all.
    reward_models, score = make_reward_scorer([config.reward], tokenizer, mesh)
    return partial(score, reward_models)


def make_round(
    config: Config,
    prompts: Batches,
    score: Score,
    apply: Apply,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    word: jax.Array | None,
) -> Callable[[Params, Params, jax.Array], tuple[Any, dict[str, Any], Shown]]:
    """Return experience(policy, reference, key) as of rollout.make_experience.

    The policy is asked for the quantile `word`, or where it is None as the prompts are.
    """
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    how = {"eos": tokenizer.ends, "pad": tokenizer.pad, "n": config.samples_per_prompt}
    if word is None:
        sample_rollout = make_rollout(apply, config.model, sampling, **how)
        asking = dict
    else:
        turn = {"system": tokenizer.system, "word": word}
        sample_rollout = make_asking_rollout(apply, config.model, sampling, **how, **turn)
        asking = partial(conditioned, **turn)
    return make_experience(
        prompts,
        rollout=sample_rollout,
        score=score,
        compute_targets=make_targets(config, apply, eos=tokenizer.ends, asking=asking),
        mesh=mesh,
        pad=tokenizer.pad,
        prompt_length=config.max_prompt,
        group=config.samples_per_prompt,
    )


def make_rounds(
    config: Config,
    prompts: Batches,
    score: Score,
    apply: Apply,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    word: jax.Array,
) -> Callable[[int, Params, Params, jax.Array], tuple[Any, dict[str, Any], Shown]]:
    """Return experience(step, policy, reference, key) -> (batch, metrics, shown) of a round.

    From the second round on the policy is asked for the quantile `word`.
    """
    plain = make_round(config, prompts, score, apply, tokenizer, mesh, None)
    asking = make_round(config, prompts, score, apply, tokenizer, mesh, word)

    def experience(
        step: int, policy: Params, reference: Params, key: jax.Array
    ) -> tuple[Any, dict[str, Any], Shown]:
        this_round = plain if step == 1 else asking
        return this_round(policy, reference, key)

    return experience


def main(config: Config) -> dict[str, float]:
    """Train a policy by Quark, in rounds; return the last metrics."""
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = Tokenizer.load(config.init)
    check_fit(config.model, tokenizer.size, config.length + ADDED)
    words = quantile_words(config, tokenizer)

    # Data: prompts. The models: the policy starts as a copy of the reference.
    source = open_source(config.data, "prompt", "train", seed=config.seed)
    prompts = open_prompts(config, source, tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(config.model))
    reference = starting_params(init, config.model, config.init, mesh, config.seed)
    frozen = {"base": lora_base(config.lora, reference), "reference": reference}

    # The parts of a round: sample and score, the pool, the update. The first responses are the
    # reference's own, which knows no quantiles yet (algorithm 1); from then on the best is asked
    # for. With LoRA the state holds adapters alone, and `full` lays them on their base.
    experience_of = make_rounds(
        config,
        prompts,
        load_score(config, tokenizer, mesh),
        apply,
        tokenizer,
        mesh,
        words[-1],
    )
    functions = make_pool_functions(config, mesh, words)
    update = make_update(config, init, apply, tokenizer.system)
    full = partial(with_adapters, config.lora, frozen["base"])
    # The gold program knows the world's prompts alone.
    evaluate_gold = None
    if config.data == "world" and config.eval_every > 0:
        evaluate_gold = make_asking_gold_evaluation(config, tokenizer, words[-1])

    # What a checkpoint holds: the policy's state and the pool.
    fresh = partial(fresh_items, config, update.optimizer, tokenizer.pad)
    shapes = abstract(jax.eval_shape(fresh, reference), mesh)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        items = {**shapes, "held": reference}
        return preview_items(config, items, prompts, tokenizer)

    with Run(config, tokenizer, unit="round") as run:
        # The state and the pool of the newest checkpoint, or of a new run.
        items = run.restore(shapes, prompts) or init_sharded(fresh, mesh, reference)
        policy = from_items(items)
        pool = items["pool"]
        run.describe(
            f"quark on {source.name}",
            policy.params,
            (policy.opt_state, reference),
            length=config.length,
        )
        for step in run.steps():
            # 1. Sample responses and score them; they take the place of the pool's oldest.
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            rollout, metrics, shown = experience_of(step, full(policy.params), reference, key)
            pool = functions.add(pool, rollout, step - 1)

            # 2. Rank the pool: every response is imitated, under its quantile.
            minibatches, of_chosen = minibatches_of(config, functions, pool, key)

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
