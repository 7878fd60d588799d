"""Supervised fine-tuning: cross-entropy on the assistant's tokens.

python train_sft.py --init=runs/align/lm --run=runs/sft
python train_sft.py --data=my_chats.jsonl --run=runs/mine
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from functools import partial

import jax

from data.bad_rows import OnBadRow
from data.batches import chat_batches
from data.mixture import first_conversations
from data.sources import open_source
from data.tokenizer import tokenizer_for
from lora import LoraConfig, with_adapters
from model import LanguageModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.likelihood import likelihood_objective
from planning.dry_run import preview
from planning.memory import check_memory
from runtime import flags
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, pin_inputs
from train_step import OptimizerConfig, Update, make_evaluation, make_optimizer, make_train_step
from training_run import Run, make_greedy_samples

EVAL_BATCHES = 4
"""Batches of held-out rows that are evaluated, at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/sft"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run to start from; None: random weights."""

    # Data
    data: str = "world"
    """Conversations: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Batches
    steps: int = 900
    """Updates."""
    batch_size: int = 8
    """Rows per step, over all devices; each holds several conversations, packed."""
    length: int = 256
    """Tokens per row."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed; with pipeline stages, parts in flight."""

    # Model
    model: ModelConfig = ModelConfig()
    """Shape of the model; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
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
    """Seed of random weights, the order of the data and samples."""
    eval_every: int = 450
    """Steps between evaluations and samples on held-out data; 0: never."""
    save_every: int = 200
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the Update of a LanguageModel: its initialiser, optimiser, loss and jitted step.

    Batches are data.batches.chat_batches' on the mesh; the loss is likelihood_objective, of whole
    parameters. The step donates its state; its `base` is the parameters under the adapters, None
    without LoRA. Nothing is loaded, and no mesh need be current before the step runs. Raises
    UserError as make_optimizer does.
    """
    init, apply = init_and_apply(LanguageModel(config.model, config.microbatches))
    objective = partial(likelihood_objective, apply)

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


@guarded
def main(config: Config) -> dict[str, float]:
    """Fine-tune on conversations; return the last row of metrics, {name: float}.

    The row, which has `step` too, has the metrics of an evaluation if its step had one. Returns {}
    where no step ran: in a dry run, and where --run has done its --steps already; a run that is
    there is resumed, and after a loss spike begun anew from a checkpoint (`guarded`). `config`: of
    flags.parse, which takes `model` from an --init; in one made by hand it must be that run's.
    Raises UserError for settings or files that do not fit. All processes must call it.
    """
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check_batch(
        "batch_size",
        config.batch_size,
        config.microbatches,
        mesh,
        config.length,
        config.model.layers,
    )
    check_memory(config, mesh)

    # Data: conversations, among which a mixture may have documents, the tokenizer they fit, and
    # packed rows. Batches at fault of a loss spike are left out (runtime/guard.py).
    train_chats = open_source(config.data, "chat", "train", seed=config.seed, with_texts=True)
    held_out_chats = open_source(config.data, "chat", "heldout", seed=config.seed, with_texts=True)
    tokenizer = tokenizer_for(config, train_chats)
    check_fit(config.model, tokenizer.size, config.length)
    packed = partial(
        chat_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        **data_shard(mesh),
    )
    batches = packed(train_chats, seed=config.seed, without=left_out(config.run))
    held_out_batches = packed(held_out_chats).once(batches=EVAL_BATCHES)
    eval_batches = [to_mesh(batch, mesh) for batch in held_out_batches]

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them.
    update = make_update(config)
    evaluate = make_evaluation(update.objective)
    full = partial(with_adapters, config.lora)

    # Samples: greedy answers to the last questions of held-out conversations.
    sample_chats = first_conversations(held_out_chats, 8)
    sample = make_greedy_samples(
        config.model,
        tokenizer,
        [chat[:-1] for chat in sample_chats],
        max_prompt=(config.length + 1) // 2,
        max_new_tokens=min(64, config.length // 2),
    )

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer, guard=config.guard) as run:
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        title = f"fine-tuning on {train_chats.name}"
        run.describe(title, state.params, (state.opt_state, base), length=config.length)
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            state, metrics = update.step(state, to_mesh(next(batches), mesh), base)
            run.record(step, metrics, tokens=config.batch_size * config.length)

            # Held-out loss, and samples in samples.md.
            if run.due(step, config.eval_every):
                params = full(base, state.params)
                run.record(step, evaluate(params, eval_batches))
                run.samples(step, sample(params, jax.random.key(step)))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
