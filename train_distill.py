"""Distillation: a student learns a teacher's distribution of each token, on data and on its own samples.

    python train_distill.py --teacher=runs/align/ppo --model.layers=2 --run=runs/small
    python train_distill.py --teacher=runs/align/ppo --init=runs/small --on_policy=1 --divergence=jsd --run=runs/own

The loss is alpha CE + (1 - alpha) tau^2 D (Hinton et al. 2015); D and the share of own samples are those of
generalised knowledge distillation (Agarwal et al. 2024, algorithm 1).
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from data.batches import chat_batches, prompt_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, note_lora_base, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit, stored_model
from objectives import distill
from objectives.likelihood import response_mask
from planning.dry_run import describe, preview
from responses import make_sampler
from rollout import make_rollout
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, require
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sampling import SamplingConfig
from sharding import MeshConfig, abstract, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, load_params, start_or_resume
from train_step import OptimizerConfig, make_evaluation, make_optimizer, make_train_step

EVAL_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/distill"
    """Folder of this run; running again resumes it."""
    teacher: str = "runs/align/ppo"
    """Run whose model is imitated, of any shape; its tokenizer is the student's."""
    init: str | None = None
    """Run that the student starts from, with the teacher's tokenizer; None: random weights."""
    data: str = "world"
    """Conversations: world, a .jsonl file, or tfds:<name>; of them also the prompts of own samples."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher, student), KL(student, teacher), or what lies between (objectives/distill.py)."""
    beta: float = 0.5
    """Of jsd: near 0 it is beta times the forward KL, near 1 (1 - beta) times the reverse."""
    alpha: float = 0.1
    """Weight of the data's own tokens as labels; 1 - alpha of the teacher. 1 is supervised fine-tuning."""
    tau: float = 1.0
    """Both models' logits are divided by this in the divergence, which is multiplied by its square."""
    on_policy: float = 0.0
    """Share of the steps that train on the student's own samples, which have no labels."""
    steps: int = 900
    batch_size: int = 32
    """Rows per step, over all devices: of packed conversations, or each one sample of the student's."""
    length: int = 64
    """Tokens per row of conversations."""
    max_prompt: int = 20
    """Longest prompt of own samples and of the gold evaluation, in tokens."""
    max_new_tokens: int = 24
    """Longest response there, in tokens."""
    temperature: float = 1.0
    """Of the student's samples."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""
    model: ModelConfig = ModelConfig()
    """The student's."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    eval_every: int = 200
    """Steps between evaluations on held-out data, and by the gold program (world only); 0: never."""
    save_every: int = 200
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def check(config: Config) -> None:
    """Raises UserError for numbers out of range."""
    require(0 < config.beta < 1, f"--beta={config.beta}: must be above 0 and below 1")
    require(0 <= config.alpha <= 1, f"--alpha={config.alpha}: must be in 0..1")
    require(config.tau > 0, f"--tau={config.tau}: must be above 0")
    require(0 <= config.on_policy <= 1, f"--on_policy={config.on_policy}: must be in 0..1")


def load_teacher(config: Config) -> tuple[ModelConfig, Tokenizer]:
    """The teacher's shape and tokenizer; raises UserError where the student cannot have them."""
    model = stored_model(config.teacher)
    tokenizer = Tokenizer.load(config.teacher)
    if (
        config.init is not None
        and (theirs := Tokenizer.load(config.init).sha256) != tokenizer.sha256
    ):
        ours = tokenizer.sha256
        raise UserError(
            f"--teacher={config.teacher}: its tokenizer is {ours[:12]}, that of --init is {theirs[:12]}"
        )
    for shape in (config.model, model):
        check_fit(shape, tokenizer.size, config.length)
        check_fit(shape, tokenizer.size, config.max_prompt + config.max_new_tokens)
    return model, tokenizer


def is_own(config: Config, step: int) -> bool:
    """Whether `step` trains on own samples: a coin that all hosts, and a resumed run, toss alike."""
    return np.random.default_rng((config.seed, step)).random() < config.on_policy


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(config)
    mesh = make_mesh(config.mesh)
    check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh)
    teacher_model, tokenizer = load_teacher(config)
    source, held_out = (
        open_source(config.data, "chat", split, seed=config.seed) for split in ("train", "heldout")
    )
    options = {"tokenizer": tokenizer, "batch_size": config.batch_size}
    options |= data_shard(mesh)
    batches = chat_batches(source, length=config.length, seed=config.seed, **options)
    asked = dataclasses.replace(source, read=lambda i: {"prompt": source.read(i)["messages"][:-1]})
    prompts = prompt_batches(asked, length=config.max_prompt, seed=config.seed, **options)
    held_out_batches = chat_batches(held_out, length=config.length, **options)
    eval_batches = [to_mesh(next(held_out_batches), mesh) for _ in range(EVAL_BATCHES)]

    init, apply = init_and_apply(LanguageModel(config.model))
    teacher_init, teacher_apply = init_and_apply(LanguageModel(teacher_model))
    divergences = {"forward_kl": distill.forward_kl, "reverse_kl": distill.reverse_kl}
    divergence = {**divergences, "jsd": partial(distill.jsd, beta=config.beta)}[config.divergence]
    weights = {"divergence": divergence, "alpha": config.alpha, "tau": config.tau}
    objective = partial(distill.distill_objective, apply, teacher_apply, **weights)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def whole(held: dict[str, Any], trained: Params) -> dict[str, Params]:
        return {
            "student": with_adapters(config.lora, held["base"], trained),
            "teacher": held["teacher"],
        }

    step_of = partial(
        make_train_step,
        microbatches=config.microbatches,
        max_norm=config.optimizer.clip,
        full=whole,
    )
    train_step, own_step = (
        step_of(objective, optimizer),
        step_of(partial(objective, labelled=False), optimizer),
    )
    evaluate, own = make_evaluation(objective), make_rollout(config, apply, tokenizer)
    respond = make_sampler(
        config.model, SamplingConfig(0.0, max_new_tokens=config.max_new_tokens), tokenizer
    )
    messages = [held_out[i]["messages"] for i in range(min(8, len(held_out)))]
    texts = [tokenizer.prompt(m[:-1])[-config.max_prompt :] for m in messages]
    judges = config.data == "world" and config.eval_every > 0
    gold = make_gold_evaluation(config, tokenizer, reference=teacher_model) if judges else None

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(batches), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_distill",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as checkpoints:
        start, state, position, base = start_or_resume(checkpoints, config, init, optimizer, mesh)
        shapes = abstract(jax.eval_shape(teacher_init, jax.random.key(0)), mesh)
        held = {"base": base, "teacher": load_params(config.teacher, shapes=shapes)}
        if position:
            batches.restore(position["batches"])
            prompts.restore(position["prompts"])
        sizes = {
            "batch_size": config.batch_size,
            "length": config.length,
            "steps": config.steps,
            "start": start,
        }
        title = f"{config.run}: distilling {config.teacher} on {source.name}"
        print(describe(title, state.params, (state.opt_state, held), **sizes))
        with Recorder(config.run, config.steps, start) as record:
            for step in record.steps():
                if is_own(config, step):
                    key = jax.random.fold_in(jax.random.key(config.seed), step)
                    batch = own(
                        whole(held, state.params)["student"], to_mesh(next(prompts), mesh), key
                    )
                    state, metrics = own_step(
                        state, {**batch, "loss_mask_BT": response_mask(batch)}, held
                    )
                    metrics = {f"own/{name}": x for name, x in metrics.items()}
                else:
                    batch = to_mesh(next(batches), mesh)
                    state, metrics = train_step(state, batch, held)
                record(step, metrics, tokens=batch["tokens_BT"].size)
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    models = whole(held, state.params)
                    record(step, evaluate(models, eval_batches))
                    responses = [
                        tokenizer.decode(r)
                        for r in respond(models["student"], texts, jax.random.key(step))
                    ]
                    shown = zip(messages, responses, strict=True)
                    record.samples(
                        step, [{"prompt": m[-2]["content"], "response": r} for m, r in shown]
                    )
                    if gold is not None:
                        record(step, gold(models["student"], models["teacher"]))
                if checkpoints.due(step, config.save_every, config.steps):
                    record.flush()
                    checkpoints.save(
                        step, as_items(state), {"batches": batches.state, "prompts": prompts.state}
                    )
                if checkpoints.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
