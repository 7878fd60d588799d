"""Direct methods on preferences: dpo, ipo, kto, orpo, simpo and their kin.

    python train_dpo.py --init=runs/align/sft --data=runs/align/comparisons.jsonl --gold
    python train_dpo.py --init=runs/align/sft --data=my_judgements.jsonl --unpaired --loss=kto

A loss of your own is a function in objectives/direct.py, its name in `Loss` here, and an entry in
`make_objective`.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from data.bad_rows import OnBadRow
from data.batches import Batches, comparison_batches
from data.preferences import with_mismatched
from data.records import Schema
from data.sources import Source, check_eval_records, open_source
from data.tokenizer import Tokenizer, tokenizer_for
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import direct
from objectives.likelihood import Apply
from objectives.unpadded import measured_ahead, model_inputs, unpadded, with_room
from planning.dry_run import preview
from planning.memory import check_memory
from rewards.reference import cached_reference
from runtime import flags
from runtime.errors import require
from runtime.guard import GuardConfig, guarded, left_out
from runtime.hosts import HostsConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, pin_inputs, starting_params
from train_step import (
    Batch,
    Objective,
    OptimizerConfig,
    Update,
    make_evaluation,
    make_optimizer,
    make_train_step,
)
from training_run import Run, make_greedy_samples

HostBatch = dict[str, np.ndarray]
Loss = Literal[
    "dpo",
    "cdpo",
    "robust_dpo",
    "ipo",
    "slic",
    "kto",
    "orpo",
    "simpo",
    "cpo",
    "slic_hf",
    "rrhf",
]


@dataclasses.dataclass(frozen=True)
class Config:
    # Folders
    run: str = "runs/dpo"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run that policy and reference start from, usually of train_sft; None: random weights."""

    # Data
    data: str = "world"
    """Comparisons: world, files, or tfds:<name>."""
    on_bad_row: OnBadRow = "stop"
    """stop: end at the first bad row of a file; skip: leave bad rows out, and list them."""
    unpaired: bool = False
    """--data has single responses, each judged desirable or not (kto)."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""

    # Loss
    loss: Loss = "dpo"
    """dpo to kto pull towards a reference; orpo to rrhf have none."""
    beta: float | None = None
    """Strength of the pull to the reference; ORPO's lambda; SimPO's and CPO's scale.
    None: 0.1, for simpo 2. IPO's target, 1 / (2 beta), is in nats a response, not a token."""
    label_smoothing: float = 0.1
    """Share of labels taken to be wrong (cdpo, robust_dpo)."""
    simpo_margin: float = 1.0
    """SimPO's margin, in scaled nats per token."""
    delta: float = 1.0
    """Margin of the hinge, in nats (slic_hf) or scaled nats (slic)."""
    weight: float = 1.0
    """Weight of the chosen response's negative log-likelihood, a sum over its tokens (cpo,
    slic_hf); the mean that CPO's authors take is 1 / its tokens."""
    desirable_weight: float = 1.0
    """KTO's weight of desirable responses."""
    undesirable_weight: float = 1.0
    """KTO's weight of undesirable responses."""
    pairs: Literal["all", "best_vs_worst"] = "all"
    """Pairs of a ranking: all, averaged over the prompt, or only the best against the worst.
    With all, orpo, cpo and slic_hf imitate the better of each pair, not the best alone."""
    reference: Literal["cached", "online"] = "cached"
    """cached: log-probabilities are computed once before the first step and kept in the run, so
    that training holds one model; online: in every step."""

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
    """Low-rank adapters, trained in place of all weights; their base is the reference."""

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
    guard: GuardConfig = GuardConfig()
    """A loss spike, and what is then left out."""
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

    @property
    def schema(self) -> Schema:
        """What a record of --data is: a comparison, or one judged response."""
        return "unpaired" if self.unpaired else "comparison"


def check(config: Config) -> None:
    """Raise UserError for numbers out of range, and for settings that cannot run together.

    `beta` must be above 0 and not None (`with_paper_defaults` fills it), `label_smoothing` at
    least 0 and below 0.5, `eval_records` at least 1, all whatever the loss. `unpaired` is for kto
    alone; pairs="best_vs_worst" is for neither kto nor rrhf. No other field is looked at.
    """
    # Numbers.
    require(config.beta is not None and config.beta > 0, f"--beta={config.beta}: must be above 0")
    require(
        0 <= config.label_smoothing < 0.5,
        f"--label_smoothing={config.label_smoothing}: must be at least 0 and below 0.5",
    )
    check_eval_records(config.eval_records)

    # What a loss compares: whole responses one by one, pairs of them, or a ranking.
    require(
        not config.unpaired or config.loss == "kto",
        f"--unpaired: --loss={config.loss} compares responses; use kto",
    )
    require(
        config.pairs == "all" or config.loss not in ("kto", "rrhf"),
        f"--pairs=best_vs_worst: --loss={config.loss} is none on pairs; leave it out",
    )


class DirectObjective(NamedTuple):
    """An objective on batches of candidates, and what its batches must have."""

    objective: Objective
    needs_reference: bool
    """The batch has `reference_BC`, the reference's log-probability of each candidate, in nats."""


def make_objective(config: Config, apply: Apply) -> DirectObjective:
    """Bind --loss to its settings and to the policy's `apply`, of a LanguageModel.

    `config`: of `with_paper_defaults` (AssertionError for a `beta` of None). The result's
    objective(params, batch) -> LossSum takes whole parameters and a batch of `make_prepare`:
    objectives.reward's Candidates, with `reference_BC` where the result's `needs_reference` is
    True, for dpo, cdpo, robust_dpo, ipo, slic and kto, and `kl_B` for kto. A batch without them is
    a KeyError.
    """
    beta = config.beta
    assert beta is not None, "with_paper_defaults comes first"
    smoothing = config.label_smoothing

    # A loss on pairs takes the log-probabilities of chosen and rejected, and, where it has a
    # reference, the reference's of both.
    extremes = config.pairs == "best_vs_worst"
    pairs = partial(direct.preference_objective, apply, extremes=extremes)

    # Pulled towards a reference with strength `beta`.
    to_a_reference = {
        "dpo": partial(pairs, loss=partial(direct.dpo, beta=beta)),
        "cdpo": partial(pairs, loss=partial(direct.cdpo, beta=beta, label_smoothing=smoothing)),
        "robust_dpo": partial(
            pairs, loss=partial(direct.robust_dpo, beta=beta, label_smoothing=smoothing)
        ),
        "ipo": partial(pairs, loss=partial(direct.ipo, beta=beta)),
        "slic": partial(pairs, loss=partial(direct.slic, beta=beta, delta=config.delta)),
        "kto": partial(
            direct.kto_objective,
            apply,
            beta=beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        ),
    }

    # Without a reference: `beta` is a scale, or the weight of a term.
    without = {
        "orpo": partial(pairs, loss=partial(direct.orpo, beta=beta), per_token=True),
        "simpo": partial(
            pairs, loss=partial(direct.simpo, beta=beta, gamma=config.simpo_margin), per_token=True
        ),
        "cpo": partial(pairs, loss=partial(direct.cpo, beta=beta, nll_weight=config.weight)),
        "slic_hf": partial(
            pairs, loss=partial(direct.slic_hf, delta=config.delta, weight=config.weight)
        ),
        "rrhf": partial(direct.ranked_objective, apply, loss=direct.rrhf, per_token=True),
    }
    # One of both tables, by its name.
    objective = {**to_a_reference, **without}[config.loss]
    return DirectObjective(objective, needs_reference=config.loss in to_a_reference)


def make_update(config: Config) -> Update:
    """Make the Update of a LanguageModel: its initialiser, optimiser, loss and jitted step.

    `config`: of `with_paper_defaults`. The loss is `make_objective`'s, its batches
    `make_prepare`'s. step(state, batch, base) donates its state alone; `base` is the parameters
    under the adapters, None without LoRA. Raises UserError as train_step.make_optimizer.
    """
    init, apply = init_and_apply(LanguageModel(config.model))
    objective = make_objective(config, apply).objective
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(
        objective,
        optimizer,
        config.microbatches,
        max_norm=config.optimizer.clip,
        full=partial(with_adapters, config.lora),
    )
    return Update(init, optimizer, objective, step)


def make_batches(
    config: Config,
    source: Source,
    tokenizer: Tokenizer,
    others: Source | None = None,
    **options: Any,
) -> Batches:
    """Iterate without end over the candidates that --loss compares, [B, C, T], shuffled by `seed`.

    Batches are NumPy arrays, as of data.batches.comparison_batches: of --batch_size prompts over
    all processes, B of them this one's. `source`: records of the schema `comparison`, or for kto
    of `unpaired` too. kto's candidates are judged responses and, last, one to another prompt: of
    `source`, or where that has one prompt alone, of `others`, of either schema; UserError, at
    once, where there is none. Other losses do not read `others`. `options`: those of
    `BatchOptions` that `config` does not give: `seed`, 0 if left out, `process`, 0, `processes`,
    1, and `without`, numbers from 1 of batches to pass over, none.
    """
    # KTO's candidates: the best and the worst response, or one judged response; and one more.
    if config.loss == "kto":
        source = with_mismatched(source, others)
    return comparison_batches(
        source, tokenizer, batch_size=config.batch_size, length=config.length, **options
    )


def passed(config: Config) -> int:
    """Return how many batches the steps of a run go through, those left out counted too.

    Of all of them the reference is cached: which are left out shows later.
    """
    return config.steps + len(left_out(config.run))


def make_prepare(
    config: Config,
    mesh: jax.sharding.Mesh,
    cached: Callable[[HostBatch], HostBatch] | None,
    reference: Params | None,
) -> Callable[[Params, HostBatch], Batch]:
    """Make prepare(policy, batch) -> `batch` on the mesh, with all that --loss reads.

    `config`: of `with_paper_defaults`. `batch`: this process's, of `make_batches`; `policy`: whole
    parameters of a language model, read for kto alone. Added are `reference_BC`, float32, a
    candidate's log-probability in nats, by `cached` (with_reference of
    rewards.reference.cached_reference) or, where that is None and the loss needs it, by a pass of
    `reference`, whole parameters; and for kto `kl_B`, in place of the last candidate
    (direct.kto_kl_estimate). A loss that needs a reference needs one of the two; for others both
    are None. All processes must call prepare. Nothing is donated.
    """
    _, apply = init_and_apply(LanguageModel(config.model))
    is_online = make_objective(config, apply).needs_reference and cached is None
    logprobs = jax.jit(partial(direct.candidate_logprobs, apply))
    with_kl = jax.jit(partial(direct.kto_kl_estimate, apply))

    def prepare(policy: Params, batch: HostBatch) -> Batch:
        # Looked up on the host, or computed on the devices.
        if cached is not None:
            batch = cached(batch)
        on_mesh = to_mesh(batch, mesh)
        if is_online:
            reference_BC = logprobs(reference, unpadded(on_mesh))
            on_mesh = {**on_mesh, "reference_BC": reference_BC}
        # The estimate is of the policy as it is now, so it cannot be cached.
        if config.loss == "kto":
            on_mesh = with_kl(policy, on_mesh)
        return on_mesh

    return prepare


def trained_on(config: Config, batch: HostBatch) -> dict[str, np.ndarray]:
    """Return `model_inputs` of the candidates that are trained on, by name, as NumPy arrays.

    `batch`: a process's, of `make_batches`, [B, C, T]. The keys are `tokens_BCT`,
    `segment_ids_BCT` and `positions_BCT`, [B, C, T] each; for kto [B, C - 1, T], without the last
    candidate, which serves the estimate of the KL alone, as in what `make_prepare` leaves.
    """
    read = model_inputs(batch)
    # The last one serves KTO's estimate only.
    return {name: x_BCT[:, :-1] if config.loss == "kto" else x_BCT for name, x_BCT in read.items()}


def with_paper_defaults(config: Config) -> Config:
    """Return `config` with the paper's value for a `beta` of None: 0.1, for simpo 2.

    Where it fills one it prints a line on stdout that says so.
    """
    # Most papers use 0.1.
    paper = direct.PAPERS.get(config.loss, direct.USUAL)
    line = flags.paper_defaults_line(config, config.loss, paper)
    if line:
        print(line)
    return flags.fill_paper_defaults(config, paper)


@guarded
def main(config: Config) -> dict[str, float]:
    """Train a policy on preferences; return the last row of metrics, {name: float}.

    Returns {} where no step ran: in a dry run, and where --run has done its --steps already. Fills
    a `beta` of None. `config`: of flags.parse, which takes `model` from the run --init; in one
    made by hand it must be that run's. Checkpoints, metrics.jsonl and samples go into --run. All
    processes must call it. Raises UserError for settings or files that do not fit.
    """
    # A mesh of all devices, and a batch that splits over it.
    config = pin_inputs(with_paper_defaults(config))
    mesh = make_mesh(config.mesh)
    check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    check_memory(config, mesh)

    # Data: comparisons or judged responses, the tokenizer they fit, and batches of prompts with
    # all their candidates.
    source = open_source(config.data, config.schema, "train", seed=config.seed)
    held_out = open_source(config.data, config.schema, "heldout", seed=config.seed)
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    candidates = partial(make_batches, config, tokenizer=tokenizer, **data_shard(mesh))
    # Batches at fault of a loss spike are left out (runtime/guard.py).
    batches = candidates(source, seed=config.seed, without=left_out(config.run))
    eval_batches = []
    if config.eval_every:
        eval_batches = candidates(held_out, others=source).once(records=config.eval_records)

    # One jitted step. With LoRA `state.params` are the adapters alone; `full` lays their base
    # beside them. The reference is the policy that training starts from.
    update = make_update(config)
    evaluate = make_evaluation(update.objective)
    full = partial(with_adapters, config.lora)
    apply = init_and_apply(LanguageModel(config.model))[1]
    needs_reference = make_objective(config, apply).needs_reference
    load_reference = partial(
        starting_params, update.init, config.model, config.init, mesh, config.seed
    )

    # Samples: greedy answers to held-out prompts. The gold program judges the world's own.
    sample = make_greedy_samples(
        config.model,
        tokenizer,
        [held_out[i]["prompt"] for i in range(min(8, len(held_out)))],
        max_prompt=config.length,
        max_new_tokens=config.max_new_tokens,
    )
    gold = None
    if config.eval_every and (config.gold or config.data == "world"):
        gold = make_gold_evaluation(config, tokenizer)

    # A dry run ends here and has written nothing.
    if config.dry_run:
        return preview(config, update.init, update.optimizer, mesh, batches, tokenizer)
    with Run(config, tokenizer, guard=config.guard) as run:
        # The reference's log-probabilities: cached before there is a state, so that one model is
        # held at a time; or, online, by a second model. The base of adapters is the reference.
        cached = None
        if needs_reference and config.reference == "cached":
            cached = cached_reference(
                config.run,
                chain(eval_batches, islice(candidates(source, seed=config.seed), passed(config))),
                (len(eval_batches), passed(config)),
                jax.jit(partial(direct.candidate_logprobs, apply)),
                load_reference,
                mesh,
            )
        state, base = run.start_or_resume(update.init, update.optimizer, mesh, batches)
        reference = base
        if needs_reference and cached is None and base is None:
            reference = load_reference()
        prepare = make_prepare(config, mesh, cached, reference)

        run.describe(
            f"{config.loss} on {source.name}",
            state.params,
            (state.opt_state, reference),
            length=config.length,
        )
        # Batches are measured a step ahead, so that the device does not wait for the host.
        measured = measured_ahead(
            batches,
            mesh,
            config.steps - run.start,
            config.microbatches,
            partial(trained_on, config),
        )
        for step in run.steps():
            # One update; its metrics are written while the next one runs.
            policy = full(base, state.params)
            rows, room = next(measured)
            batch = with_room(prepare(policy, rows), room)
            state, metrics = update.step(state, batch, base)
            run.record(step, metrics, tokens=batch["tokens_BCT"].size)

            # Held-out loss, samples, and gold shares. Their KL needs the reference, loaded for
            # this moment where it is not held.
            if run.due(step, config.eval_every):
                policy = full(base, state.params)
                run.record(
                    step, evaluate(policy, list(map(partial(prepare, policy), eval_batches)))
                )
                run.samples(step, sample(policy, jax.random.key(step)))
                if gold is not None:
                    run.record(step, gold(policy, reference or load_reference()))
            run.save_when_due(step, as_items(state), batches)
    return run.last_metrics


if __name__ == "__main__":
    flags.run(main, Config)
