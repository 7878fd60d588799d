"""Reward models of steps: cross-entropy on labels of a response's steps (Lightman et al. 2023).

    python train_prm.py --init=runs/maths --data=arithmetic --run=runs/prm
    python train_prm.py --init=runs/maths --data=labelled.jsonl --run=runs/prm
    python train_prm.py --init=runs/big --data=phase2_train.jsonl --length=1024 --run=runs/prm800k

collect/steps.py writes labelled.jsonl. Labels on all steps train a process reward model, on the
last step only an outcome reward model.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import numpy as np

from data.bad_rows import OnBadRow
from data.batches import collate
from data.sources import Source, check_eval_records, evaluated_split, open_source
from data.steps import encode_steps, pad_steps, steps_batches
from data.tokenizer import Tokenizer, tokenizer_for
from evaluation.steps import step_table
from evaluation.tables import evaluated_records
from lora import LoraConfig, with_adapters
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.likelihood import Apply, inputs
from objectives.reward import process_objective
from objectives.unpadded import measured_ahead, with_room
from planning.dry_run import preview
from planning.memory import check_memory
from runtime import flags
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_host, to_mesh
from train_state import as_items, pin_inputs
from train_step import OptimizerConfig, Update, make_optimizer, make_train_step
from training_run import Run

EVAL_ROWS = 128
"""Solutions evaluated at a time."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/prm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run whose decoder to start from, usually of train_sft; None: random weights."""

    # Data
    data: str = "arithmetic"
    """Solutions with labelled steps: arithmetic, files (PRM800K's too), or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    eval_data: str | None = None
    """Held-out solutions; None: the held-out part of --data."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Batches
    steps: int = 1200
    """Updates."""
    batch_size: int = 32
    """Solutions per step, over all devices."""
    length: int = 64
    """Longest prompt and solution together, in tokens."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""

    # Model
    scores: Literal["steps"] = "steps"
    """Parts of a response that the scalars score; stored, so that no script takes them for whole
    responses' scores."""
    model: ModelConfig = ModelConfig()
    """Shape of the model; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
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
    eval_every: int = 200
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 1024
    """Held-out solutions evaluated."""
    save_every: int = 200
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the Update of a ScalarModel: its initialiser, optimiser, loss and jitted step.

    Batches are data.steps.steps_batches' on the mesh; the loss is process_objective. step(state,
    batch, base) donates its state alone; `base` is the parameters under the adapters, None without
    LoRA. Raises UserError as train_step.make_optimizer.
    """
    init, apply = init_and_apply(ScalarModel(config.model))
    objective = partial(process_objective, apply)

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


def make_step_evaluation(
    apply: Apply, source: Source, tokenizer: Tokenizer, length: int, most: int
) -> Callable[[Params], dict[str, float]]:
    """Make evaluate(params) -> the measures of evaluation.steps.step_table, {"eval/NAME": float}.

    They are accuracy, auc, first_error, wrong and steps, which that function explains. `apply`: of
    a ScalarModel; `params`: its whole parameters. The first `most` records (schema `steps`) of
    `source` are taken, and of them those left out that have no labelled step within `length`
    tokens; a note on stderr counts them. make_step_evaluation raises UserError where none is left.
    evaluate waits for the device, and every process must call it.
    """
    # A solution that is cut before its first label has nothing to measure.
    records = evaluated_records(source, encode_steps, tokenizer, length, most)

    # Parts of one shape, for one compilation: the last is filled with the first record.
    filled = records + records[:1] * (-len(records) % EVAL_ROWS)
    pad = partial(pad_steps, fixed=True)
    batches = []
    for start in range(0, len(filled), EVAL_ROWS):
        part = filled[start : start + EVAL_ROWS]
        batches.append(collate(encode_steps, pad, part, tokenizer, length))
    # The labels, without those that fill the last part up.
    targets_NT = np.concatenate([batch["targets_BT"] for batch in batches])[: len(records)]
    mask_NT = np.concatenate([batch["loss_mask_BT"] for batch in batches])[: len(records)]

    @jax.jit
    def step_logits(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        return apply(params, *inputs(batch)).scalars_BT

    def evaluate(params: Params) -> dict[str, float]:
        parts = [to_host(step_logits(params, batch)) for batch in batches]
        logits_NT = np.concatenate(parts)[: len(records)]
        table = step_table(logits_NT, targets_NT, mask_NT)
        return {f"eval/{name}": value for name, value in table.items()}

    return evaluate


@guarded
def main(config: Config) -> dict[str, float]:
    """Train on solutions with labelled steps; return the last row of metrics, {name: float}.

    Returns {} where no step ran: in a dry run, and where --run has done its --steps already.
    `config`: of flags.parse, which takes `model` from the run --init; in one made by hand it must
    be that run's. Checkpoints and metrics.jsonl go into --run. All processes must call it. Raises
    UserError for settings or files that do not fit.
    """
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    check_memory(config, mesh)
    check_eval_records(config.eval_records)

    # Data: solutions, the tokenizer they fit, and batches of one solution a row. A local file of
    # --eval_data is held out as a whole.
    source = open_source(config.data, "steps", "train", seed=config.seed)
    held_out = open_source(config.data, "steps", "heldout", seed=config.seed)
    if config.eval_data is not None:
        held_out_split = evaluated_split(config.eval_data)
        held_out = open_source(config.eval_data, "steps", held_out_split, seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    batches = steps_batches(
        source,
        tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
        without=left_out(config.run),
        **data_shard(mesh),
    )

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them. `evaluate` tells right steps of held-out solutions from wrong ones.
    update = make_update(config)
    full = partial(with_adapters, config.lora)
    _, apply = init_and_apply(ScalarModel(config.model))
    evaluate = make_step_evaluation(apply, held_out, tokenizer, config.length, config.eval_records)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer, guard=config.guard) as run:
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        title = f"step-wise reward model on {source.name}"
        run.describe(title, state.params, (state.opt_state, base), length=config.length)
        # Batches are measured a step ahead, so that the device does not wait for the host.
        measured = measured_ahead(batches, mesh, config.steps - run.start, config.microbatches)
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            rows, room = next(measured)
            batch = with_room(to_mesh(rows, mesh), room)
            state, metrics = update.step(state, batch, base)
            run.record(step, metrics, tokens=batch["tokens_BT"].size)

            # Accuracy, AUC and the first wrong step on held-out solutions.
            if run.due(step, config.eval_every):
                run.record(step, evaluate(full(base, state.params)))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
