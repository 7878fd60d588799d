"""Pre-training: cross-entropy on every token of packed documents.

python train_lm.py --run=runs/lm
python train_lm.py --data=my_texts.jsonl --model.preset=llama3.2-1b --run=runs/mine
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from functools import partial

import jax

from data.bad_rows import OnBadRow
from data.batches import text_batches
from data.sources import open_source
from data.tokenizer import tokenizer_for
from lora import LoraConfig, with_adapters
from model import LanguageModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.likelihood import likelihood_objective
from planning.dry_run import preview
from planning.memory import check_memory
from responses import make_sampler
from runtime import flags
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from sampling import SamplingConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, pin_inputs
from train_step import OptimizerConfig, Update, make_evaluation, make_optimizer, make_train_step
from training_run import Run, sample_pairs

EVAL_BATCHES = 4
"""Batches of held-out rows that are evaluated, at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/lm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run to start from; None: random weights."""

    # Data
    data: str = "world"
    """Documents: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Batches
    steps: int = 1200
    """Updates."""
    batch_size: int = 32
    """Rows per step, over all devices; each holds several documents, packed."""
    length: int = 64
    """Tokens per row."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed; with pipeline stages, parts in flight."""

    # Model
    model: ModelConfig = ModelConfig()
    """Shape of the model; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-3)
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
    eval_every: int = 600
    """Steps between evaluations and samples on held-out data; 0: never."""
    save_every: int = 400
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the Update of a LanguageModel: its initialiser, optimiser, loss and jitted step.

    Batches are data.batches.text_batches' on the mesh; the loss is likelihood_objective. The step
    donates its state; its `base` is the parameters under the adapters, None without LoRA. Raises
    UserError as make_optimizer does.
    """
    # A pipeline is inside the model, which then cuts the batch itself.
    init, apply = init_and_apply(LanguageModel(config.model, config.microbatches))
    objective = partial(likelihood_objective, apply)
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
    """Pre-train on documents; return the last row of metrics, {name: float}.

    Returns {} where no step ran: in a dry run, and where --run has done its --steps already.
    `config`: of flags.parse, which takes `model` from an --init; one made by hand must have that
    run's (else UserError). After a loss spike it goes on from a checkpoint
    (runtime.guard.guarded). Raises UserError for settings or files that do not fit, and ends after
    a signal as Run.steps says. Every process must call it.
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

    # Data: documents, the tokenizer they fit, and packed rows. Batches at fault of a loss
    # spike are left out (runtime/guard.py).
    train_texts = open_source(config.data, "text", "train", seed=config.seed)
    held_out_texts = open_source(config.data, "text", "heldout", seed=config.seed)
    tokenizer = tokenizer_for(config, train_texts)
    check_fit(config.model, tokenizer.size, config.length)
    packed = partial(
        text_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        **data_shard(mesh),
    )
    batches = packed(train_texts, seed=config.seed, without=left_out(config.run))
    held_out_batches = packed(held_out_texts).once(batches=EVAL_BATCHES)
    eval_batches = [to_mesh(batch, mesh) for batch in held_out_batches]

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them.
    update = make_update(config)
    evaluate = make_evaluation(update.objective)
    full = partial(with_adapters, config.lora)

    # Samples: greedy continuations of the first held-out documents' beginnings.
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=min(64, config.length // 2))
    respond = make_sampler(config.model, sampling, tokenizer)
    sample_texts = [held_out_texts[i]["text"] for i in range(min(8, len(held_out_texts)))]
    documents = [tokenizer.document(text) for text in sample_texts]
    prompts = [tokens[: min(16, len(tokens) // 2)] for tokens in documents]
    beginnings = [tokenizer.decode(tokens) for tokens in prompts]

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer, guard=config.guard) as run:
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        title = f"pre-training on {train_texts.name}"
        run.describe(title, state.params, (state.opt_state, base), length=config.length)
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            state, metrics = update.step(state, to_mesh(next(batches), mesh), base)
            run.record(step, metrics, tokens=config.batch_size * config.length)

            # Held-out loss, and samples in samples.md.
            if run.due(step, config.eval_every):
                params = full(base, state.params)
                run.record(step, evaluate(params, eval_batches))
                responses = respond(params, prompts, jax.random.key(step))
                run.samples(step, sample_pairs(beginnings, responses, tokenizer))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
