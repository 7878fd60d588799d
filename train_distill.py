"""Distillation: a student learns a teacher's distribution of each token.

    python train_distill.py --teacher=runs/align/ppo --model.layers=2 --run=runs/small
    python train_distill.py --teacher=runs/align/ppo --init=runs/small --on_policy=1 \\
        --divergence=jsd --run=runs/own

On data and on the student's own samples. The loss is alpha CE + (1 - alpha) tau^2 D (Hinton et al.
2015); D and the share of own samples are those of generalised knowledge distillation (Agarwal et
al. 2024, algorithm 1).
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from data.bad_rows import OnBadRow
from data.batches import chat_batches, prompt_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit, stored_model
from objectives import distill
from objectives.likelihood import response_mask
from planning.dry_run import preview
from planning.memory import check_memory
from rollout import RolloutConfig, check_rollout, make_rollout
from runtime import flags
from runtime.errors import require
from runtime.guard import GuardConfig, batches_of_steps, guarded, left_out
from runtime.hosts import HostsConfig
from sampling import SamplingConfig
from sharding import MeshConfig, abstract, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, has_scalar_head, load_params, pin_inputs
from train_step import (
    COUNTS,
    Batch,
    Objective,
    OptimizerConfig,
    TrainState,
    make_evaluation,
    make_optimizer,
    make_train_step,
)
from training_run import Run, make_greedy_samples

EVAL_BATCHES = 4
"""Batches of held-out rows that are evaluated, at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/distill"
    """Folder of this run; running again resumes it."""
    teacher: str = "runs/align/ppo"
    """Run whose model is imitated, of any shape; its tokenizer is the student's."""
    init: str | None = None
    """Run that the student starts from, with the teacher's tokenizer; None: random weights."""

    # Data
    data: str = "world"
    """Conversations: world, files, or tfds:<name>; own samples answer their prompts."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""

    # Loss
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher, student), KL(student, teacher), or one in between (objectives/distill.py)."""
    beta: float = 0.5
    """For jsd: near 0 it is beta times the forward KL, near 1 (1 - beta) times the reverse."""
    alpha: float = 0.1
    """Weight of the data's own tokens as labels; 1 - alpha: the teacher's. 1: fine-tuning."""
    tau: float = 1.0
    """Temperature of both models in the divergence, which is multiplied by its square."""
    on_policy: float = 0.0
    """Share of the steps that train on the student's own samples, which have no labels."""

    # Batches
    steps: int = 900
    """Updates."""
    batch_size: int = 8
    """Rows per step, over all devices: packed conversations, or one own sample each."""
    length: int = 256
    """Tokens per row of conversations."""
    max_prompt: int = 20
    """Longest prompt of own samples and of the gold evaluation, in tokens."""
    max_new_tokens: int = 24
    """Longest own sample and response of the gold evaluation, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of own samples."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""

    # Model
    model: ModelConfig = ModelConfig()
    """The student's shape; that of --init where there is one."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
    """Learning rate, schedule, clipping."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters, trained in place of all weights."""

    # Run
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    int8: bool = False
    """Sample with weights in int8, half of bfloat16 to read."""
    rollout: RolloutConfig = RolloutConfig()
    """Devices over which the student is cut while it samples."""
    guard: GuardConfig = GuardConfig()
    """A loss spike, and what is then left out."""
    hosts: HostsConfig = HostsConfig()
    """Processes of this run."""
    seed: int = 0
    """Seed of random weights, the order of the data, the kind of each step and samples."""
    eval_every: int = 200
    """Steps between evaluations on held-out data, and by the gold program on world; 0: never."""
    save_every: int = 200
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def check(config: Config) -> None:
    """Raise UserError where `beta`, `alpha`, `tau` or `on_policy` is out of range.

    `beta` must be above 0 and below 1, whatever the divergence, `tau` above 0, and `alpha` and
    `on_policy` from 0 to 1. Other settings are not looked at.
    """
    # At either end of beta the divergence is 0, whatever the student says.
    require(0 < config.beta < 1, f"--beta={config.beta}: must be above 0 and below 1")
    require(0 <= config.alpha <= 1, f"--alpha={config.alpha}: must be in 0..1")
    require(config.tau > 0, f"--tau={config.tau}: must be above 0")
    require(0 <= config.on_policy <= 1, f"--on_policy={config.on_policy}: must be in 0..1")


def load_teacher(config: Config) -> tuple[ModelConfig, Tokenizer]:
    """Return the shape and tokenizer of the run --teacher; UserError for models that do not fit.

    The vocabularies of both models (the student's is `config.model`) must hold the tokenizer, and
    their contexts rows of --length and of --max_prompt + --max_new_tokens. A student from --init
    must have the teacher's tokenizer. UserError also for a run that is missing.
    """
    teacher_model = stored_model(config.teacher)
    require(
        not has_scalar_head(config.teacher),
        f"--teacher={config.teacher}: a reward model, which predicts no tokens; name a policy",
    )
    tokenizer = Tokenizer.load(config.teacher)
    # Distributions over tokens can be compared only where the tokens are the same.
    if config.init is not None:
        theirs = Tokenizer.load(config.init).sha256
        require(
            theirs == tokenizer.sha256,
            f"--teacher={config.teacher}: its tokenizer is {tokenizer.sha256[:12]}, "
            f"that of --init is {theirs[:12]}",
        )
    # Both models see all rows.
    for model in (config.model, teacher_model):
        check_fit(model, tokenizer.size, config.length)
        check_fit(model, tokenizer.size, config.max_prompt + config.max_new_tokens)
    return teacher_model, tokenizer


def load_teacher_params(
    config: Config, teacher_model: ModelConfig, mesh: jax.sharding.Mesh
) -> Params:
    """Load the teacher's whole parameters, laid on `mesh`; UserError as load_params raises it.

    They are float32 jax.Arrays. `teacher_model`: of `load_teacher`. A reward model is refused too.
    All processes must call it.
    """
    init, _ = init_and_apply(LanguageModel(teacher_model))
    # Straight onto its shards, never whole on one device.
    shapes = abstract(jax.eval_shape(init, jax.random.key(0)), mesh)
    return load_params(config.teacher, shapes=shapes)


class DistillUpdate(NamedTuple):
    """The two jitted steps and their pieces.

    `held`, which both steps read and do not donate: {"base", "teacher"}, the parameters under the
    student's adapters, None without LoRA, and the teacher's whole parameters.
    """

    init: Callable[[jax.Array], Params]
    """init(key) -> random parameters of the student."""
    optimizer: optax.GradientTransformation
    objective: Objective
    """objective({"student", "teacher"}, batch of conversations) -> sums, see
    train_step.Objective."""
    data_step: Callable[[TrainState, Batch, Params], tuple[TrainState, dict[str, jax.Array]]]
    """data_step(state, batch, held) -> (state, metrics): labels and teacher; donates `state`."""
    own_step: Callable[[TrainState, Batch, Params], tuple[TrainState, dict[str, jax.Array]]]
    """own_step, the same on own samples: the teacher alone. Its metrics begin with `own/`, but for
    train_step.COUNTS."""


def make_update(config: Config, teacher_model: ModelConfig) -> DistillUpdate:
    """Make the student's initialiser, its optimiser, its loss and the two jitted steps.

    `teacher_model`: of `load_teacher`. Batches of data_step are chat_batches' on the mesh, those
    of own_step `make_own_samples`'. Both donate their state, not `held`. Raises UserError as
    make_optimizer does.
    """
    # Two models, which may be of different shapes.
    init, apply = init_and_apply(LanguageModel(config.model))
    _, teacher_apply = init_and_apply(LanguageModel(teacher_model))
    divergences: dict[str, distill.Divergence] = {
        "forward_kl": distill.forward_kl,
        "reverse_kl": distill.reverse_kl,
        "jsd": partial(distill.jsd, beta=config.beta),
    }
    # What both losses have: the two models, the divergence and its weights.
    objective = partial(
        distill.distill_objective,
        apply,
        teacher_apply,
        divergence=divergences[config.divergence],
        alpha=config.alpha,
        tau=config.tau,
    )

    # On data and on own samples: one optimiser, one state, two losses.
    optimizer = make_optimizer(config.optimizer, config.steps)
    make_step = partial(
        make_train_step,
        optimizer=optimizer,
        microbatches=config.microbatches,
        max_norm=config.optimizer.clip,
        full=partial(student_and_teacher, config.lora),
    )
    data_step = make_step(objective)
    unlabelled_step = make_step(partial(objective, labelled=False))

    def own_step(state: TrainState, batch: Batch, held: Params):
        state, metrics = unlabelled_step(state, batch, held)
        # Both steps count the updates of the one state.
        return state, {
            name if name in COUNTS else f"own/{name}": value for name, value in metrics.items()
        }

    return DistillUpdate(init, optimizer, objective, data_step, own_step)


def student_and_teacher(lora: LoraConfig, held: Params | None, trained: Params) -> Params:
    """Return {"student", "teacher"}, the whole parameters of both, no weight copied.

    `lora`: the student's. `held`, not None: {"base", "teacher"}, where "base" is the parameters
    under the student's adapters, None without LoRA. `trained`: the student's whole parameters, or
    its adapters, which are laid beside the base's weights (lora.with_adapters). Derivatives are
    not stopped: differentiate by `trained` alone.
    """
    # Without adapters `trained` is the student as it is.
    assert held is not None
    student = with_adapters(lora, held["base"], trained)
    return {"student": student, "teacher": held["teacher"]}


def make_own_samples(
    config: Config, tokenizer: Tokenizer
) -> Callable[[Params, Batch, int], Batch]:
    """Make own_samples(student, prompts, step) -> one response to each prompt, as a batch.

    `student`: its whole parameters, not donated. `prompts`: left-padded [B, P], of prompt_batches,
    on the current mesh; `step`: an int, gives the key, with --seed. The batch, [B, P + R] with R =
    --max_new_tokens: `tokens_BT`, `segment_ids_BT` (0 for padding, else 1) and `positions_BT`,
    int32, and `loss_mask_BT`, float32, 1 at the response's own tokens, its end token included.
    Compiled; all processes must call own_samples.
    """
    # The student's own sampler.
    _, apply = init_and_apply(LanguageModel(config.model))
    sampling = SamplingConfig(
        config.temperature, max_new_tokens=config.max_new_tokens, int8=config.int8
    )
    rollout = make_rollout(
        apply,
        config.model,
        sampling,
        eos=tokenizer.ends,
        pad=tokenizer.pad,
        tensor=config.rollout.tensor,
    )

    def own_samples(student: Params, prompts: Batch, step: int) -> Batch:
        # Another key each step, and the same one after resuming.
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        samples = rollout(student, prompts, key)
        # Rows as conversations have them; only the response is learnt.
        return {
            "tokens_BT": samples["tokens_BT"],
            "segment_ids_BT": samples["segment_ids_BT"],
            "positions_BT": samples["positions_BT"],
            "loss_mask_BT": response_mask(samples),  # type: ignore[arg-type]
        }

    return own_samples


def is_own(config: Config, number: int) -> bool:
    """Return True if batch `number`, from 1, is of own samples: with a chance of --on_policy.

    Beside that the toss depends on --seed and `number` alone: all hosts, and a resumed run, toss
    alike. A step's number is its own until batches are left out (runtime/guard.py).
    """
    return np.random.default_rng((config.seed, number)).random() < config.on_policy


def own_steps(config: Config) -> list[bool]:
    """Return for each step of the run whether it trains on own samples."""
    numbers = batches_of_steps(config.steps, left_out(config.run))
    return [is_own(config, number) for number in numbers]


def left_out_of_streams(config: Config) -> dict[str, set[int]]:
    """Return which batches of each stream the run leaves out, numbered within the stream."""
    numbers = left_out(config.run)
    counts = {"batches": 0, "prompts": 0}
    without: dict[str, set[int]] = {"batches": set(), "prompts": set()}
    for number in range(1, max(numbers, default=0) + 1):
        stream = "prompts" if is_own(config, number) else "batches"
        counts[stream] += 1
        if number in numbers:
            without[stream].add(counts[stream])
    return without


def batches_a_step(config: Config) -> dict[str, float]:
    """Return how many batches of each stream a step reads, in the mean over all steps."""
    own_share = sum(own_steps(config)) / config.steps
    return {"batches": 1 - own_share, "prompts": own_share}


def prompts_of(chats: Source) -> Source:
    """Turn conversations (schema `chat`) into prompts, {"prompt": messages without the last}.

    Returns a Source like `chats`, whose records have no other key; each is read when it is asked
    for. The last turn is the assistant's, after another, as the schema has it.
    """

    def read(row: int) -> dict[str, Any]:
        # The student gives the last turn itself.
        return {"prompt": chats.read(row)["messages"][:-1]}

    return dataclasses.replace(chats, read=read)


@guarded
def main(config: Config) -> dict[str, float]:
    """Distil a teacher into a student; return the last row of metrics, {name: float}.

    The row is the last of metrics.jsonl in --run; {} where no step ran: in a dry run, and where
    --run has done its --steps already. `config`: of flags.parse, which takes `model` from --init,
    where there is one; in one made by hand it must be that run's. All processes must call it.
    Raises UserError for settings or files that do not fit.
    """
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(config)
    mesh = make_mesh(config.mesh)
    check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh)
    check_rollout(config.rollout, config.model, mesh)
    check_memory(config, mesh)

    # The teacher's shape, and the tokenizer that both have.
    teacher_model, tokenizer = load_teacher(config)

    # Data: packed rows of conversations; their prompts, for own samples.
    train_chats = open_source(config.data, "chat", "train", seed=config.seed)
    held_out_chats = open_source(config.data, "chat", "heldout", seed=config.seed)
    packed = partial(
        chat_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        **data_shard(mesh),
    )
    # Batches at fault of a loss spike are left out, of either stream (runtime/guard.py).
    without = left_out_of_streams(config)
    batches = packed(train_chats, seed=config.seed, without=without["batches"])
    prompts = prompt_batches(
        prompts_of(train_chats),
        tokenizer,
        batch_size=config.batch_size,
        length=config.max_prompt,
        seed=config.seed,
        without=without["prompts"],
        **data_shard(mesh),
    )
    held_out_batches = packed(held_out_chats).once(batches=EVAL_BATCHES)
    eval_batches = [to_mesh(batch, mesh) for batch in held_out_batches]

    # Two jitted steps. With LoRA `state.params` are the adapters alone; `full` lays their base,
    # and the teacher, beside them.
    update = make_update(config, teacher_model)
    full = partial(student_and_teacher, config.lora)
    evaluate = make_evaluation(update.objective)
    own_samples = make_own_samples(config, tokenizer)

    # Samples: greedy answers to held-out conversations. The gold program judges the world's own.
    sample = make_greedy_samples(
        config.model,
        tokenizer,
        [held_out_chats[i]["messages"][:-1] for i in range(min(8, len(held_out_chats)))],
        max_prompt=config.max_prompt,
        max_new_tokens=config.max_new_tokens,
    )
    gold = None
    if config.data == "world" and config.eval_every:
        gold = make_gold_evaluation(config, tokenizer, reference=teacher_model)

    # A dry run ends here and has written nothing.
    data = {"batches": batches, "prompts": prompts}
    if config.dry_run:
        return preview(
            config,
            update.init,
            update.optimizer,
            mesh,
            data,
            tokenizer,
            batches_a_step(config),
        )
    with Run(config, tokenizer, guard=config.guard) as run:
        # Both streams go on where a resumed run left them. The teacher is loaded once.
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, data)
        held = {"base": base, "teacher": load_teacher_params(config, teacher_model, mesh)}
        run.describe(
            f"distilling {config.teacher} on {train_chats.name}",
            state.params,
            (state.opt_state, held),
            length=config.length,
            batches_a_step=batches_a_step(config),
        )
        are_own = own_steps(config)
        for step in run.steps():
            # One update, on own samples or on data; its metrics are written while the next runs.
            if are_own[step - 1]:
                student = full(held, state.params)["student"]
                batch = own_samples(student, to_mesh(next(prompts), mesh), step)
                state, metrics = update.own_step(state, batch, held)
            else:
                batch = to_mesh(next(batches), mesh)
                state, metrics = update.data_step(state, batch, held)
            run.record(step, metrics, tokens=batch["tokens_BT"].size)

            # Held-out loss, samples, and gold shares with the KL to the teacher.
            if run.due(step, config.eval_every):
                models = full(held, state.params)
                run.record(step, evaluate(models, eval_batches))
                run.samples(step, sample(models["student"], jax.random.key(step)))
                if gold is not None:
                    run.record(step, gold(models["student"], models["teacher"]))
            run.save_when_due(step, as_items(state), data)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
