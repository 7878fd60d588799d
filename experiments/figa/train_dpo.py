"""FIGA: a likelihood weighted token by token, by what a better response changed in a worse one.

    PYTHONPATH=. python experiments/figa/train_dpo.py --init=runs/align/sft \\
        --data=runs/align/comparisons.jsonl --run=runs/figa

A fork of train_dpo.py: its own weights of tokens (batches.py), its own loss (objective.py), no
reference.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from functools import partial

import jax

from data.bad_rows import OnBadRow
from data.batches import comparison_batches
from data.sources import check_eval_records, open_source
from data.tokenizer import tokenizer_for
from evaluation.gold import make_gold_evaluation
from experiments.figa.batches import with_edit_weights
from experiments.figa.objective import figa_objective
from lora import LoraConfig, with_adapters
from model import LanguageModel, init_and_apply
from model_config import ModelConfig, check_fit
from planning.dry_run import preview
from runtime import flags
from runtime.hosts import HostsConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, pin_inputs, starting_params
from train_step import OptimizerConfig, Update, make_evaluation, make_optimizer, make_train_step
from training_run import Run, make_greedy_samples


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/figa"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run to start from, usually of train_sft; None: random weights."""

    # Data
    data: str = "world"
    """Comparisons: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Loss
    removed_weight: float = 0.5
    """Weight of tokens that the best response removes from the worst; added ones weigh 1."""

    # Batches
    steps: int = 300
    """Updates."""
    batch_size: int = 32
    """Prompts per step, over all devices, each with all its responses."""
    length: int = 40
    """Longest prompt and response together, in tokens."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""

    # Model
    model: ModelConfig = ModelConfig()
    """Shape of the model; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, beta2=0.999, weight_decay=0.0)
    """Learning rate, schedule, clipping."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters, trained in place of all weights."""

    # Evaluation
    gold: bool = False
    """Gold evaluation on the world's prompts also where --data is a file (of collect/rank.py)."""
    temperature: float = 1.0
    """Sampling temperature of the responses that the gold program judges."""
    max_prompt: int = 24
    """Longest prompt of the gold evaluation, in tokens."""
    max_new_tokens: int = 24
    """Longest response of the gold evaluation and the samples, in tokens."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 512
    """Held-out records evaluated."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    hosts: HostsConfig = HostsConfig()
    """Processes of this run."""
    seed: int = 0
    """Seed of random weights, the order of the data and samples."""
    save_every: int = 100
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the initialiser of a LanguageModel, its optimiser, its loss and the jitted step."""
    init, apply = init_and_apply(LanguageModel(config.model))
    objective = partial(figa_objective, apply)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=config.optimizer.clip,
        full=partial(with_adapters, config.lora),
    )
    return Update(init, optimizer, objective, step)


def main(config: Config) -> dict[str, float]:
    """Train a policy on the edits between worst and best responses; return the last metrics."""
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    check_eval_records(config.eval_records)

    # Data: comparisons, the tokenizer they fit, and batches of prompts with all their
    # candidates, whose tokens `weighted` weighs.
    source = open_source(config.data, "comparison", "train", seed=config.seed)
    held_out = open_source(config.data, "comparison", "heldout", seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    candidates = partial(
        comparison_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        **data_shard(mesh),
    )
    batches = candidates(source, seed=config.seed)
    weighted = partial(with_edit_weights, removed=config.removed_weight)
    held_out_batches = []
    if config.eval_every:
        held_out_batches = candidates(held_out).once(records=config.eval_records)
    eval_batches = [weighted(batch) for batch in held_out_batches]

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them. The gold evaluation measures the KL to the policy that training starts from.
    update = make_update(config)
    evaluate = make_evaluation(update.objective)
    full = partial(with_adapters, config.lora)
    load_start = partial(
        starting_params, update.init, config.model, config.init, mesh, config.seed
    )

    # Samples: greedy answers to held-out prompts. The gold program judges the world's own.
    prompts = [held_out[i]["prompt"] for i in range(min(8, len(held_out)))]
    sample = make_greedy_samples(
        config.model,
        tokenizer,
        prompts,
        max_prompt=config.length,
        max_new_tokens=config.max_new_tokens,
    )
    gold = None
    if config.eval_every and (config.gold or config.data == "world"):
        gold = make_gold_evaluation(config, tokenizer)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer) as run:
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        title = f"figa on {source.name}"
        run.describe(title, state.params, (state.opt_state, base), length=config.length)
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            batch = to_mesh(weighted(next(batches)), mesh)
            state, metrics = update.step(state, batch, base)
            run.record(step, metrics, tokens=batch["loss_mask_BCT"].size)

            # Held-out loss, samples, and gold shares.
            if run.due(step, config.eval_every):
                params = full(base, state.params)
                run.record(step, evaluate(params, [to_mesh(b, mesh) for b in eval_batches]))
                run.samples(step, sample(params, jax.random.key(step)))
                if gold is not None:
                    run.record(step, gold(params, base or load_start()))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
