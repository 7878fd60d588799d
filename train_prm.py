"""Process and outcome reward models: cross-entropy on labels of a response's steps (Lightman et al. 2023).

    python train_prm.py --init=runs/maths --data=arithmetic --run=runs/prm
    python train_prm.py --init=runs/maths --data=labelled.jsonl --run=runs/prm     # lines of collect/steps.py
    python train_prm.py --init=runs/big --data=phase2_train.jsonl --length=1024 --run=runs/prm800k

The data decides which: labels on all steps train a process model, on the last step only an outcome model.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from data.batches import collate
from data.sources import Source, open_source
from data.steps import encode_steps, pad_steps, steps_batches
from data.tokenizer import Tokenizer, tokenizer_for
from evaluation.steps import step_table
from lora import LoraConfig, note_lora_base, with_adapters
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.likelihood import inputs
from objectives.reward import process_objective
from planning.dry_run import describe, preview
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_host, to_mesh
from train_state import as_items, start_or_resume
from train_step import OptimizerConfig, make_optimizer, make_train_step

EVAL_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/prm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run whose decoder to start from, usually of train_sft; None: random weights."""
    data: str = "arithmetic"
    """Solutions with labelled steps: arithmetic, a .jsonl file (also PRM800K's), or tfds:<name>."""
    eval_data: str | None = None
    """Held-out ones; None: the held-out part of --data."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""
    steps: int = 1200
    batch_size: int = 32
    """Solutions per step, over all devices."""
    length: int = 64
    """Longest prompt and solution together, in tokens."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 200
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 1024
    """Held-out solutions evaluated."""
    save_every: int = 200
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_evaluation(config: Config, apply: Any, source: Source, tokenizer: Tokenizer):
    """evaluate(params) -> `step_table` on the first of `source`, names prefixed by `eval/`."""
    records = (source[i] for i in range(min(config.eval_records, len(source))))
    records = [record for record in records if encode_steps(record, tokenizer, config.length)[0]]
    if not records:
        raise UserError(
            f"{source.name}: no labelled step fits into {config.length} tokens; raise --length"
        )
    filled = records + records[:1] * (
        -len(records) % EVAL_ROWS
    )  # so that all parts have one shape
    pad = partial(pad_steps, fixed=True)
    parts = [filled[i : i + EVAL_ROWS] for i in range(0, len(filled), EVAL_ROWS)]
    batches = [collate(encode_steps, pad, part, tokenizer, config.length) for part in parts]
    logits = jax.jit(lambda params, batch: apply(params, *inputs(batch)).scalars_BT)

    def evaluate(params: Params) -> dict[str, float]:
        logits_NT = np.concatenate([to_host(logits(params, batch)) for batch in batches])
        columns = (
            np.concatenate([b[name] for b in batches]) for name in ("targets_BT", "loss_mask_BT")
        )
        table = step_table(*(x[: len(records)] for x in (logits_NT, *columns)))
        return {f"eval/{name}": value for name, value in table.items()}

    return evaluate


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    source = open_source(config.data, "steps", "train", seed=config.seed)
    split = (
        "all"
        if config.eval_data and config.eval_data.endswith((".jsonl", ".jsonl.gz"))
        else "heldout"
    )
    held_out = open_source(config.eval_data or config.data, "steps", split, seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    sizes = {"batch_size": config.batch_size, "length": config.length}
    batches = steps_batches(source, tokenizer, **sizes, seed=config.seed, **data_shard(mesh))

    init, apply = init_and_apply(ScalarModel(config.model))
    optimizer = make_optimizer(config.optimizer, config.steps)
    whole = partial(with_adapters, config.lora)
    objective = partial(process_objective, apply)
    train_step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=whole
    )
    evaluate = make_evaluation(config, apply, held_out, tokenizer)

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(batches), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_prm",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as saved:
        start, state, position, base = start_or_resume(saved, config, init, optimizer, mesh)
        if position:
            batches.restore(position)
        title = f"{config.run}: step-wise reward model on {source.name}"
        print(
            describe(
                title,
                state.params,
                (state.opt_state, base),
                **sizes,
                steps=config.steps,
                start=start,
            )
        )
        with Recorder(config.run, config.steps, start) as record:
            for step in record.steps():
                batch = next(batches)
                state, metrics = train_step(state, to_mesh(batch, mesh), base)
                record(step, metrics, tokens=batch["tokens_BT"].size)
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    record(step, evaluate(whole(base, state.params)))
                if saved.due(step, config.save_every, config.steps):
                    record.flush()
                    saved.save(step, as_items(state), batches.state)
                if saved.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
