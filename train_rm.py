"""Reward models from comparisons: Bradley-Terry on pairs, or on all pairs of a ranking.

    python train_rm.py --init=runs/align/sft --data=runs/align/comparisons.jsonl --run=runs/rm
    python train_rm.py --data=my_comparisons.jsonl --run=runs/mine

Afterwards the reward is shifted so that reference responses (`--demonstrations`) score 0
on average.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data.bad_rows import OnBadRow
from data.batches import comparison_batches, is_refused
from data.records import Message
from data.sources import Source, check_eval_records, evaluated_split, open_source
from data.tokenizer import Tokenizer, tokenizer_for
from evaluation.reward_model import make_comparison_evaluation
from lora import LoraConfig, with_adapters
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.reward import ranking_objective
from objectives.unpadded import measured_ahead, with_room
from planning.dry_run import preview
from planning.memory import check_memory
from rewards.models import make_text_scorer
from runtime import flags
from runtime.errors import require
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, pin_inputs
from train_step import OptimizerConfig, Update, make_optimizer, make_train_step
from training_run import Run

REFERENCE_RESPONSES = 256
"""Most reference responses that the reward's shift is a mean over."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/rm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run of train_sft, or a reward model to continue on more comparisons; None: random."""

    # Data
    data: str = "world"
    """Comparisons: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    eval_data: str | None = None
    """Held-out comparisons; None: the held-out part of --data."""
    demonstrations: str | None = None
    """Reference responses, as conversations; the reward is shifted so that their mean is 0.
    None: the best response of each comparison."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Batches
    steps: int = 500
    """Updates."""
    batch_size: int = 32
    """Prompts per step, over all devices, each with all its candidates."""
    length: int = 32
    """Longest prompt and response together, in tokens."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""

    # Loss
    center_rewards_coef: float = 0.0
    """Coefficient of (r_chosen + r_rejected)^2, which holds rewards near 0; 0.01 is usual."""
    lm_coef: float = 0.0
    """Coefficient of the best response's negative log-likelihood per token; for --model.tied."""

    # Model
    model: ModelConfig = ModelConfig()
    """Shape of the model; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1.5e-3)
    """Learning rate, schedule, clipping."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters, trained in place of all weights."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    guard: GuardConfig = GuardConfig()
    """A loss spike, and what is then left out."""
    hosts: HostsConfig = HostsConfig()
    """Processes of this run."""
    seed: int = 0
    """Seed of random weights and the order of the data."""
    eval_every: int = 500
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 1000
    """Held-out comparisons evaluated."""
    save_every: int = 250
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the Update of a ScalarModel: its initialiser, optimiser, loss and jitted step.

    Batches are data.batches.comparison_batches' on the mesh, the loss is ranking_objective. The
    step donates its state; its `base` is the parameters under the adapters, None without LoRA.
    Raises UserError as make_optimizer does.
    """
    # The loss: on comparisons, and on the best responses as text where lm_coef is above 0.
    init, apply = init_and_apply(ScalarModel(config.model))
    objective = partial(
        ranking_objective,
        apply,
        center_rewards_coef=config.center_rewards_coef,
        lm_coef=config.lm_coef,
    )

    # The step, which trains the adapters alone where there are any.
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=config.optimizer.clip,
        full=partial(with_adapters, config.lora),
    )
    return Update(init, optimizer, objective, step)


def reference_responses(
    config: Config, source: Source, tokenizer: Tokenizer
) -> tuple[list[list[Message]], list[str]]:
    """Return (prompts, responses): prompts as lists of messages, a good response to each, a text.

    With --demonstrations: its first conversations, the last turn as the response; `source` is not
    read then. Without: the first comparisons of `source` (records of the schema `comparison`),
    each with the first of its best responses. At most REFERENCE_RESPONSES, the same on every host;
    of them those left out that the chat template of `tokenizer` refuses. Raises UserError as
    open_source and data.bad_rows do, and where none is left.
    """
    prompts: list[list[Message]] = []
    responses: list[str] = []
    if config.demonstrations is None:
        # The comparisons' own best.
        name = source.name
        for record in source.first(REFERENCE_RESPONSES):
            best = int(np.argmin(record["ranking"]))
            prompts.append(record["prompt"])
            responses.append(record["responses"][best])
    else:
        # The last turns of demonstrations.
        chats = open_source(config.demonstrations, "chat", "train", seed=config.seed)
        name = chats.name
        for record in chats.first(REFERENCE_RESPONSES):
            *prompt, answer = record["messages"]
            prompts.append(prompt)
            responses.append(answer["content"])

    kept = [not is_refused(prompt, tokenizer, name) for prompt in prompts]
    require(any(kept), "the chat template refuses every reference response; give others")
    return list(itertools.compress(prompts, kept)), list(itertools.compress(responses, kept))


def mean_score(
    params: Params,
    score: Callable[..., list[float]],
    prompts: list[list[Message]],
    responses: list[str],
) -> jax.Array:
    """Return the mean reward of reference responses, a float32 scalar, the same on every host.

    `params`: whole parameters of a reward model. `score`: of rewards.models.make_text_scorer,
    score(params, prompts, responses) -> rewards; so it waits for the device, and all processes
    must call it. `prompts` and `responses`: of `reference_responses`. The model's bias less this
    mean scores those responses 0 on average (Stiennon et al. 2020, section 3.4).
    """
    rewards = score(params, prompts, responses)
    return jnp.float32(np.mean(rewards))


def shifted(params: Params, mean: jax.Array) -> Params:
    """Return a reward model whose rewards are those of `params` less `mean`, by its bias.

    `params`: whole parameters of a ScalarModel, or with LoRA what is trained of them; its other
    arrays are shared. `mean`: a scalar.
    """
    # All rewards move alike, so no comparison changes.
    return {**params, "bias": params["bias"] - mean}


@guarded
def main(config: Config) -> dict[str, float]:
    """Train a reward model on comparisons; return the last row of metrics, {name: float}.

    After the last step its bias is shifted (`mean_score`), before that step is evaluated and
    saved. The row is the last of metrics.jsonl in --run; {} where no step ran: in a dry run, and
    where --run has done its --steps already. `config`: of flags.parse, which takes `model` from
    --init, where there is one; in one made by hand it must be that run's. All processes must call
    it. Raises UserError for settings or files that do not fit.
    """
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    check_memory(config, mesh)
    check_eval_records(config.eval_records)
    require(
        config.model.tied or not config.lm_coef,
        "--lm_coef: a reward model keeps no unembedding of its own; use a model with --model.tied",
    )

    # Data: comparisons, the tokenizer they fit, and batches of prompts with all their candidates.
    source = open_source(config.data, "comparison", "train", seed=config.seed)
    held_out = open_source(config.data, "comparison", "heldout", seed=config.seed)
    if config.eval_data is not None:
        held_out_split = evaluated_split(config.eval_data)
        held_out = open_source(config.eval_data, "comparison", held_out_split, seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    batches = comparison_batches(
        source,
        tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
        without=left_out(config.run),
        **data_shard(mesh),
    )

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them. `evaluate` compares rewards of held-out responses, `score` rewards any.
    update = make_update(config)
    evaluate = make_comparison_evaluation(
        config.model, held_out, tokenizer, config.length, config.eval_records
    )
    score = make_text_scorer(config.model, tokenizer, config.length)
    # Read now: a mistake in them must not show at the last step.
    references = reference_responses(config, source, tokenizer)
    full = partial(with_adapters, config.lora)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer, guard=config.guard) as run:
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        title = f"reward model on {source.name}, {source.candidates} candidates a prompt"
        run.describe(title, state.params, (state.opt_state, base), length=config.length)
        # Batches are measured a step ahead, so that the device does not wait for the host.
        measured = measured_ahead(batches, mesh, config.steps - run.start, config.microbatches)
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            rows, room = next(measured)
            batch = with_room(to_mesh(rows, mesh), room)
            state, metrics = update.step(state, batch, base)
            run.record(step, metrics, tokens=batch["tokens_BCT"].size)

            # The last step shifts the reward: reference responses score 0 on average.
            if step == config.steps:
                mean = mean_score(full(base, state.params), score, *references)
                state = dataclasses.replace(state, params=shifted(state.params, mean))

            # Accuracy and calibration on held-out comparisons, of the shifted reward at the end.
            if run.due(step, config.eval_every):
                run.record(step, evaluate(full(base, state.params)))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
