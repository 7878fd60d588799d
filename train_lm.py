"""Pre-training: cross-entropy on every token of packed documents.

python train_lm.py --run=runs/lm
python train_lm.py --data=my_texts.jsonl --model.preset=llama3.2-1b --run=runs/mine
"""

import dataclasses
from functools import partial

import jax

from data.batches import text_batches
from data.sources import open_source
from data.tokenizer import tokenizer_for
from lora import LoraConfig, note_lora_base, with_adapters
from model import LanguageModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.likelihood import likelihood_objective
from planning.dry_run import describe, preview
from responses import make_sampler
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sampling import SamplingConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, start_or_resume
from train_step import OptimizerConfig, Update, make_evaluation, make_optimizer, make_train_step

EVAL_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/lm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run to start from; None: random weights."""
    data: str = "world"
    """Documents: world, a .jsonl file, or tfds:<name>."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""
    steps: int = 1200
    batch_size: int = 32
    """Rows per step, over all devices; each holds several documents, packed."""
    length: int = 64
    """Tokens per row."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed; over stages, that go through the pipeline one after another."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=4e-3)
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 600
    """Steps between evaluations and samples on held-out data; 0: never."""
    save_every: int = 400
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_update(config: Config) -> Update:
    """Make the model's initialiser, its optimiser, its loss and the jitted step."""
    init, apply = init_and_apply(LanguageModel(config.model, config.microbatches))
    optimizer = make_optimizer(config.optimizer, config.steps)
    objective = partial(likelihood_objective, apply)
    whole = partial(with_adapters, config.lora)
    step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=whole
    )
    return Update(init, optimizer, objective, step)


@guarded
def main(config: Config) -> dict[str, float]:
    config = note_lora_base(config)
    mesh = make_mesh(config.mesh)
    check_batch(
        "batch_size",
        config.batch_size,
        config.microbatches,
        mesh,
        config.length,
        config.model.layers,
    )
    source, held_out = (
        open_source(config.data, "text", split, seed=config.seed) for split in ("train", "heldout")
    )
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    host = data_shard(mesh)
    batches_of = partial(
        text_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        **host,
    )
    batches, held_out_batches = (
        batches_of(source, seed=config.seed, without=left_out(config.run)),
        batches_of(held_out),
    )
    eval_batches = [to_mesh(next(held_out_batches), mesh) for _ in range(EVAL_BATCHES)]

    init, optimizer, objective, train_step = make_update(config)
    whole, evaluate = partial(with_adapters, config.lora), make_evaluation(objective)
    respond = make_sampler(
        config.model, SamplingConfig(0.0, max_new_tokens=min(64, config.length // 2)), tokenizer
    )
    documents = [tokenizer.document(held_out[i]["text"]) for i in range(min(8, len(held_out)))]
    prompts = [tokens[: min(16, len(tokens) // 2)] for tokens in documents]

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(batches), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_lm",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as checkpoints:
        start, state, position, base = start_or_resume(checkpoints, config, init, optimizer, mesh)
        if position:
            batches.restore(position)
        sizes = {
            "batch_size": config.batch_size,
            "length": config.length,
            "steps": config.steps,
            "start": start,
        }
        sizes["microbatches"] = config.microbatches
        print(
            describe(
                f"{config.run}: pre-training on {source.name}",
                state.params,
                (state.opt_state, base),
                **sizes,
            )
        )
        with Recorder(config.run, config.steps, start, guard=config.guard) as record:
            for step in record.steps():
                state, metrics = train_step(state, to_mesh(next(batches), mesh), base)
                record(step, metrics, tokens=config.batch_size * config.length)
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    params = whole(base, state.params)
                    record(step, evaluate(params, eval_batches))
                    responses = [
                        tokenizer.decode(r) for r in respond(params, prompts, jax.random.key(step))
                    ]
                    shown = zip(map(tokenizer.decode, prompts), responses, strict=True)
                    record.samples(step, [{"prompt": p, "response": r} for p, r in shown])
                if checkpoints.due(step, config.save_every, config.steps):
                    record.flush()
                    checkpoints.save(step, as_items(state), batches.state)
                if checkpoints.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
