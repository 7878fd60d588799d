"""Reward models from comparisons: Bradley-Terry on pairs, or on all pairs of a ranking.

    python train_rm.py --init=runs/align/sft --data=runs/align/comparisons.jsonl --run=runs/rm
    python train_rm.py --data=my_comparisons.jsonl --run=runs/mine

Afterwards the reward is shifted so that good responses (`--demonstrations`) score 0 on average.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import comparison_batches
from data.sources import open_source
from data.tokenizer import tokenizer_for
from evaluation.reward_model import make_comparison_evaluation
from lora import LoraConfig, note_lora_base, with_adapters
from model import Params, ScalarModel, init_and_apply
from model_config import ModelConfig, check_fit
from objectives.reward import ranking_objective
from planning.dry_run import describe, preview
from rewards.models import make_text_scorer
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, start_or_resume
from train_step import OptimizerConfig, Update, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/rm"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run to start from: of train_sft, or a reward model that further comparisons shall better; None: random."""
    data: str = "world"
    """Comparisons: world, a .jsonl file, or tfds:<name>."""
    eval_data: str | None = None
    """Held-out comparisons; None: the held-out part of --data."""
    demonstrations: str | None = None
    """Conversations whose responses shall score 0 on average; None: the best response of each comparison."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""
    steps: int = 500
    batch_size: int = 32
    """Prompts per step, over all devices, each with all its candidates."""
    length: int = 32
    """Longest prompt and response together, in tokens."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""
    center_rewards_coef: float = 0.0
    """Coefficient of (r_chosen + r_rejected)^2; 0.01 is usual."""
    lm_coef: float = 0.0
    """Coefficient of the best response's negative log-likelihood per token; needs tied embeddings."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1.5e-3)
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 500
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 1000
    """Held-out comparisons evaluated."""
    save_every: int = 250
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def mean_score(params: Params, score: Any, config: Config, source: Any) -> jax.Array:
    """Of good responses; the reward is shifted so that it becomes 0 (Stiennon et al. 2020, section 3.4)."""
    if config.demonstrations is None:
        records = [source[i] for i in range(min(256, len(source)))]
        pairs = [(r["prompt"], r["responses"][int(np.argmin(r["ranking"]))]) for r in records]
    else:
        chats = open_source(config.demonstrations, "chat", "train", seed=config.seed)
        turns = [chats[i]["messages"] for i in range(min(256, len(chats)))]
        pairs = [(messages[:-1], messages[-1]["content"]) for messages in turns]
    return jnp.float32(np.mean(score(params, *zip(*pairs, strict=True))))


def make_update(config: Config) -> Update:
    """Make the model's initialiser, its optimiser, its loss and the jitted step."""
    init, apply = init_and_apply(ScalarModel(config.model))
    optimizer = make_optimizer(config.optimizer, config.steps)
    coefficients = {
        "center_rewards_coef": config.center_rewards_coef,
        "lm_coef": config.lm_coef,
    }
    objective = partial(ranking_objective, apply, **coefficients)
    whole = partial(with_adapters, config.lora)
    step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=whole
    )
    return Update(init, optimizer, objective, step)


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    if config.lm_coef and not config.model.tied:
        raise UserError(
            "--lm_coef: a reward model keeps no unembedding of its own; use a model with --model.tied"
        )
    source = open_source(config.data, "comparison", "train", seed=config.seed)
    held_out = open_source(config.data, "comparison", "heldout", seed=config.seed)
    if config.eval_data is not None:
        held_out = open_source(config.eval_data, "comparison", "all", seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    host = data_shard(mesh)
    sizes = {"batch_size": config.batch_size, "length": config.length}
    batches = comparison_batches(source, tokenizer, **sizes, seed=config.seed, **host)

    init, optimizer, _, train_step = make_update(config)
    whole = partial(with_adapters, config.lora)
    evaluate = make_comparison_evaluation(
        config.model, held_out, tokenizer, config.length, config.eval_records
    )
    score = make_text_scorer(config.model, tokenizer, config.length)

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(batches), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_rm",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as checkpoints:
        start, state, position, base = start_or_resume(checkpoints, config, init, optimizer, mesh)
        if position:
            batches.restore(position)
        title = (
            f"{config.run}: reward model on {source.name}, {source.candidates} candidates a prompt"
        )
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
                record(step, metrics, tokens=batch["tokens_BCT"].size)
                if step == config.steps:
                    mean = mean_score(whole(base, state.params), score, config, source)
                    state = state.replace(
                        params={**state.params, "bias": state.params["bias"] - mean}
                    )
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    record(step, evaluate(whole(base, state.params)))
                if checkpoints.due(step, config.save_every, config.steps):
                    record.flush()
                    checkpoints.save(step, as_items(state), batches.state)
                if checkpoints.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
