"""Direct methods on preferences: dpo, ipo, kto, orpo, simpo and their kin; chosen and rejected in one pass.

    python train_dpo.py --init=runs/align/sft --data=runs/align/comparisons.jsonl --gold --run=runs/dpo
    python train_dpo.py --init=runs/align/sft --data=my_judgements.jsonl --unpaired --loss=kto --run=runs/mine

A loss of your own is a function in objectives/direct.py and an entry in `make_objective`.
"""

import dataclasses
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import Batches, chat_batches, comparison_batches
from data.preferences import (
    encode_contrast,
    forget,
    hindsight,
    with_edit_weights,
    with_mismatched,
    with_other_prompts,
    with_rank_weights,
)
from data.sources import Source, open_source
from data.tokenizer import tokenizer_for
from evaluation.gold import make_gold_evaluation
from lora import LoraConfig, note_lora_base, with_adapters
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig, check_fit
from objectives import direct
from objectives.likelihood import likelihood_objective
from planning.dry_run import describe, preview
from responses import make_sampler
from rewards.reference import cached_reference
from runtime import flags
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.flags import fill_paper_defaults
from runtime.hosts import HostsConfig
from runtime.metrics import Recorder
from sampling import SamplingConfig
from sharding import MeshConfig, check_batch, data_shard, make_mesh, to_mesh
from train_state import as_items, start_or_resume, starting_params
from train_step import (
    Objective,
    OptimizerConfig,
    Update,
    make_evaluation,
    make_optimizer,
    make_train_step,
)

NO_RANKINGS = ("kto", "contrastive", "unlikelihood", "figa", "hindsight")
"""Losses that do not compare the responses of a ranking."""


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = "runs/dpo"
    """Folder of this run; running again resumes it."""
    init: str | None = None
    """Run that policy and reference start from, usually of train_sft; None: random weights."""
    data: str = "world"
    """Comparisons: world, a .jsonl file, or tfds:<name>."""
    unpaired: bool = False
    """--data has single responses, each judged desirable or not (kto and unlikelihood)."""
    tokenizer: str | None = None
    """A SentencePiece .model; None: that of --init, else one trained on the data."""
    loss: str = "dpo"
    """dpo, cdpo, robust_dpo, ipo, slic, kto; without a reference orpo, simpo, cpo, slic_hf, rrhf, contrastive,
    unlikelihood, figa, hindsight."""
    beta: float | None = None
    """Strength of the pull to the reference; ORPO's lambda; SimPO's and CPO's scale. None: 0.1, for simpo 2."""
    label_smoothing: float = 0.1
    """Share of labels taken to be wrong (cdpo, robust_dpo)."""
    simpo_margin: float = 1.0
    """SimPO's margin, in scaled nats per token."""
    delta: float = 1.0
    """Margin of the hinge, in nats (slic_hf) or scaled nats (slic)."""
    weight: float | None = None
    """Of the second term: the chosen's NLL (cpo, slic_hf), unwanted tokens (unlikelihood, figa). None: 1, figa 0.5."""
    desirable_weight: float = 1.0
    """KTO's weight of desirable responses."""
    undesirable_weight: float = 1.0
    """KTO's weight of undesirable responses."""
    hidden: float = 0.0
    """Share of past tokens that cannot be looked at, up to 0.15 (hindsight)."""
    instructions: int = 4
    """Prompts between which a response decides (contrastive)."""
    pairs: Literal["all", "best_vs_worst"] = "all"
    """Of a ranking: all its pairs, averaged over the prompt, or only the best against the worst. With all, orpo, cpo
    and slic_hf imitate the better of each pair, not the best alone."""
    reference: Literal["cached", "online"] = "cached"
    """Its log-probabilities: computed once before the first step and kept in the run, so that training holds one
    model; or in every step."""
    steps: int = 300
    batch_size: int = 32
    """Prompts per step, over all devices, each with all its responses."""
    length: int = 40
    """Longest prompt and response together, in tokens; of hindsight, both responses."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, beta2=0.999, weight_decay=0.0)
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    seed: int = 0
    gold: bool = False
    """Gold evaluation, of the world's own prompts, also where --data is a file (as collect/rank.py writes it)."""
    temperature: float = 1.0
    """Of the responses that the gold program judges."""
    max_prompt: int = 24
    """Longest prompt of the gold evaluation, in tokens."""
    max_new_tokens: int = 24
    """Longest response of the gold evaluation, in tokens."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; 0: never."""
    eval_records: int = 512
    """Held-out records evaluated."""
    save_every: int = 100
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    dry_run: bool = False
    """Print shapes, shardings, memory and the first batch, and write nothing."""


def make_objective(config: Config, apply: Any) -> tuple[Objective, bool]:
    """The objective of --loss, and whether it needs the reference's log-probabilities."""
    beta, smoothing = {"beta": config.beta}, {"label_smoothing": config.label_smoothing}
    pairs = partial(direct.preference_objective, apply, extremes=config.pairs == "best_vs_worst")
    kto = {
        "desirable_weight": config.desirable_weight,
        "undesirable_weight": config.undesirable_weight,
    }
    to_a_reference = {
        "dpo": partial(pairs, loss=partial(direct.dpo, **beta)),
        "cdpo": partial(pairs, loss=partial(direct.cdpo, **beta, **smoothing)),
        "robust_dpo": partial(pairs, loss=partial(direct.robust_dpo, **beta, **smoothing)),
        "ipo": partial(pairs, loss=partial(direct.ipo, **beta)),
        "slic": partial(pairs, loss=partial(direct.slic, **beta, delta=config.delta)),
        "kto": partial(direct.kto_objective, apply, **beta, **kto),
    }
    without = {
        "orpo": partial(pairs, loss=partial(direct.orpo, **beta), per_token=True),
        "simpo": partial(
            pairs, loss=partial(direct.simpo, **beta, gamma=config.simpo_margin), per_token=True
        ),
        "cpo": partial(pairs, loss=partial(direct.cpo, **beta, nll_weight=config.weight)),
        "slic_hf": partial(
            pairs, loss=partial(direct.slic_hf, delta=config.delta, weight=config.weight)
        ),
        "rrhf": partial(direct.ranked_objective, apply, loss=direct.rrhf, per_token=True),
        "contrastive": partial(direct.ranked_objective, apply, loss=direct.contrastive),
        "unlikelihood": partial(direct.token_objective, apply, loss=direct.unlikelihood),
        "figa": partial(direct.token_objective, apply, loss=direct.figa),
        "hindsight": partial(likelihood_objective, apply),
    }
    if config.loss not in {**to_a_reference, **without}:
        raise UserError(
            f"--loss={config.loss}: unknown; choose one of {', '.join({**to_a_reference, **without})}"
        )
    return {**to_a_reference, **without}[config.loss], config.loss in to_a_reference


def make_update(config: Config) -> Update:
    """Make the model's initialiser, its optimiser, its loss and the jitted step."""
    init, apply = init_and_apply(LanguageModel(config.model))
    objective = make_objective(config, apply)[0]
    optimizer = make_optimizer(config.optimizer, config.steps)
    full = partial(with_adapters, config.lora)
    step = make_train_step(
        objective, optimizer, config.microbatches, max_norm=config.optimizer.clip, full=full
    )
    return Update(init, optimizer, objective, step)


def check(config: Config) -> None:
    """Raises UserError for settings that cannot run together."""
    if not config.beta > 0:
        raise UserError(f"--beta={config.beta}: must be above 0")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(
            f"--label_smoothing={config.label_smoothing}: must be at least 0 and below 0.5"
        )
    if config.unpaired and config.loss not in ("kto", "unlikelihood"):
        raise UserError(
            f"--unpaired: --loss={config.loss} compares responses; use kto or unlikelihood"
        )
    if config.pairs == "best_vs_worst" and config.loss in (*NO_RANKINGS, "rrhf"):
        raise UserError(
            f"--pairs=best_vs_worst: --loss={config.loss} is none on pairs; leave it out"
        )
    if config.instructions < 2:
        raise UserError(f"--instructions={config.instructions}: must be at least 2")


def make_batches(config: Config, source: Source, tokenizer: Any, **options: Any) -> Batches:
    """Batches in the form that --loss takes."""
    options |= {"batch_size": config.batch_size, "length": config.length}
    if config.loss == "hindsight":
        return chat_batches(hindsight(source), tokenizer, **options)
    if config.loss == "contrastive":
        prompts = with_other_prompts(source, config.instructions)
        return comparison_batches(prompts, tokenizer, encode=encode_contrast, **options)
    # Judged responses with one to another prompt; unlikelihood's unpaired records take the same form.
    judged = config.loss == "kto" or config.unpaired
    return comparison_batches(with_mismatched(source) if judged else source, tokenizer, **options)


def on_host(
    config: Config, batch: dict[str, np.ndarray], step: int, host: int
) -> dict[str, np.ndarray]:
    """What a loss needs beside the batch and NumPy can tell."""
    if config.loss in ("figa", "unlikelihood"):
        return {"figa": with_edit_weights, "unlikelihood": with_rank_weights}[config.loss](
            batch, config.weight
        )
    if config.loss == "hindsight" and config.hidden:
        rng = np.random.default_rng((config.seed, step, host))
        return forget(batch, config.hidden, rng)
    return batch


def make_with_kl(apply: Any):
    """with_kl(policy, batch): the last candidate, which answers another prompt, becomes the estimate `kl_B`."""

    @jax.jit
    def with_kl(policy: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        last = {name: x[:, -1:] if name != "margin_B" else x for name, x in batch.items()}
        kl = direct.mismatched_kl(
            direct.response_logprobs(apply, policy, last), last["reference_BC"]
        )
        rest = {name: x[:, :-1] for name, x in batch.items() if name != "margin_B"}
        return {**rest, "kl_B": jnp.broadcast_to(kl, batch["margin_B"].shape)}

    return with_kl


def main(config: Config) -> dict[str, float]:
    config = note_lora_base(
        fill_paper_defaults(config, direct.PAPERS.get(config.loss, direct.USUAL))
    )
    mesh = make_mesh(config.mesh)
    check(config)
    check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
    init, optimizer, objective, train_step = make_update(config)
    apply = init_and_apply(LanguageModel(config.model))[1]
    needs_reference = make_objective(config, apply)[1]
    schema = "unpaired" if config.unpaired else "comparison"
    source, held_out = (
        open_source(config.data, schema, split, seed=config.seed) for split in ("train", "heldout")
    )
    tokenizer = tokenizer_for(config, source)
    check_fit(config.model, tokenizer.size, config.length)
    host = data_shard(mesh)
    batches_of = partial(make_batches, config, tokenizer=tokenizer, **host)
    batches = batches_of(source, seed=config.seed)
    count = (
        max(1, min(config.eval_records, len(held_out)) // config.batch_size)
        if config.eval_every
        else 0
    )
    eval_batches = [
        on_host(config, batch, 0, host["process"]) for batch in islice(batches_of(held_out), count)
    ]

    whole, evaluate = partial(with_adapters, config.lora), make_evaluation(objective)
    load_reference = partial(starting_params, init, config.model, config.init, mesh, config.seed)
    logprobs = jax.jit(partial(direct.response_logprobs, apply))
    with_kl = make_with_kl(apply) if config.loss == "kto" else lambda policy, batch: batch
    judges = (config.gold or config.data == "world") and config.eval_every > 0
    gold = make_gold_evaluation(config, tokenizer) if judges else None
    respond = make_sampler(
        config.model, SamplingConfig(0.0, max_new_tokens=config.max_new_tokens), tokenizer
    )
    asked = [held_out[i]["prompt"] for i in range(min(8, len(held_out)))]
    prompts = [tokenizer.prompt(messages)[-config.length :] for messages in asked]

    if config.dry_run:
        return preview(config, init, optimizer, mesh, next(batches), tokenizer)
    with Checkpoints(
        config.run,
        config,
        script="train_dpo",
        tokenizer=tokenizer.model,
        keep=config.keep_checkpoints,
    ) as checkpoints:
        kept, reference = None, None
        if needs_reference and config.reference == "cached":
            ahead = chain(eval_batches, islice(batches_of(source, seed=config.seed), config.steps))
            kept = cached_reference(
                config.run, ahead, (count, config.steps), logprobs, load_reference, mesh
            )

        def prepared(policy: Params, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            batch = to_mesh(batch if kept is None else kept(batch), mesh)
            if reference is not None:
                batch = {**batch, "reference_BC": logprobs(reference, batch)}
            return with_kl(policy, batch)

        start, state, position, base = start_or_resume(checkpoints, config, init, optimizer, mesh)
        if needs_reference and kept is None:  # the base of adapters is the reference
            reference = load_reference() if base is None else base
        if position:
            batches.restore(position)
        sizes = {
            "batch_size": config.batch_size,
            "length": config.length,
            "steps": config.steps,
            "start": start,
        }
        held = reference if base is None else base
        title = f"{config.run}: {config.loss} on {source.name}"
        print(describe(title, state.params, (state.opt_state, held), **sizes))
        with Recorder(config.run, config.steps, start) as record:
            for step in record.steps():
                batch = on_host(config, next(batches), step, host["process"])
                tokens = batch[
                    "loss_mask_BT" if config.loss == "hindsight" else "loss_mask_BCT"
                ].size
                state, metrics = train_step(
                    state, prepared(whole(base, state.params), batch), base
                )
                record(step, metrics, tokens=tokens)
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    params = whole(base, state.params)
                    record(step, evaluate(params, [prepared(params, b) for b in eval_batches]))
                    responses = [
                        tokenizer.decode(r) for r in respond(params, prompts, jax.random.key(step))
                    ]
                    shown = zip(asked, responses, strict=True)
                    record.samples(
                        step, [{"prompt": m[-1]["content"], "response": r} for m, r in shown]
                    )
                    if (
                        gold is not None
                    ):  # the KL needs the reference, loaded for this moment if not held
                        record(step, gold(params, load_reference() if held is None else held))
                if checkpoints.due(step, config.save_every, config.steps):
                    record.flush()
                    checkpoints.save(step, as_items(state), batches.state)
                if checkpoints.stopping:
                    break
    return record.last


if __name__ == "__main__":
    flags.run(main, Config)
