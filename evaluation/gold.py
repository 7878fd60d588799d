"""The world's gold program on a model's responses: shares with intervals, KL to a reference, distinct answers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.batches import cut_left, pad_prompts
from data.tokenizer import Tokenizer
from evaluation.intervals import mean, share
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.policy import response_logprobs
from rollout import join_responses
from sampling import SamplingConfig, generate
from sharding import to_host
from tasks import world

CRITERIA = ("helpful", "honest", "harmless", "all")


# --- statistics


# --- the world


def make_measure(
    config: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    prompt_length: int,
    condition: Callable = lambda prompts: prompts,
    reference: ModelConfig | None = None,
) -> Callable:
    """measure(params, reference, prompts: texts, seed) -> one (response, length, KL to reference in nats) each.

    `condition`: the batch of prompts as `params` sees them (the reference sees them as they are). `reference`: the
    reference's shape, where it is not `config`.
    """
    apply, reference_apply = (
        init_and_apply(LanguageModel(shape))[1] for shape in (config, reference or config)
    )
    rows = 256

    @jax.jit
    def sample(params: Params, reference: Params, prompts: dict[str, jax.Array], key: jax.Array):
        asked = condition(prompts)
        samples = generate(
            apply, config, params, asked, key, sampling, eos=tokenizer.eos, pad=tokenizer.pad
        )
        reference_BR = response_logprobs(
            reference_apply, reference, join_responses(prompts, samples), sampling.temperature
        )
        return samples, ((samples.logp_BR - reference_BR) * samples.mask_BR).sum(1)

    def measure(
        params: Params, reference: Params, prompts: Sequence[str], seed: int
    ) -> list[tuple[str, int, float]]:
        out = []
        for start in range(0, len(prompts), rows):
            part = list(prompts[start : start + rows])
            tokens = [cut_left(tokenizer.prompt(text), prompt_length, tokenizer) for text in part]
            padded = [{"tokens": row} for row in tokens + tokens[:1] * (rows - len(part))]
            batch = pad_prompts(padded, prompt_length, tokenizer.pad, fixed=True)
            key = jax.random.fold_in(jax.random.key(seed), start)
            samples, kl_B = to_host(sample(params, reference, batch, key))
            for b in range(len(part)):
                length = int(samples.mask_BR[b].sum())
                out.append(
                    (
                        tokenizer.decode(samples.response_BR[b, :length].tolist()),
                        length,
                        float(kl_B[b]),
                    )
                )
        return out

    return measure


def gold_rows(requests: Sequence[world.Request], responses: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each response: the request's text and kind, the response, and what the gold program says."""
    rows = []
    for request, response in zip(requests, responses, strict=True):
        gold = world.gold(request.text, response)
        rows.append(
            {
                "prompt": request.text,
                "kind": request.kind,
                "response": response,
                "all": bool(gold.all),
            }
        )
        rows[-1] |= {name: bool(getattr(gold, name)) for name in CRITERIA[:3]}
    return rows


def distinct_answers(requests: Sequence[world.Request], responses: Sequence[str]) -> float:
    """Distinct answers given to lookups, as a share of the distinct right ones: below 1 where a policy collapses."""
    pairs = [
        (r.answer, world.extract_answer(r, t))
        for r, t in zip(requests, responses, strict=True)
        if r.kind == "lookup"
    ]
    right, given = {a for a, _ in pairs}, {g for _, g in pairs if g is not None}
    return len(given) / max(len(right), 1)


def summarise(
    rows: list[dict[str, Any]], lengths: Sequence[int], kls: Sequence[float]
) -> dict[str, Any]:
    """Shares, mean length and KL of one model's responses, each with its interval as `<name>_ci`."""
    parts = {name: share([row[name] for row in rows]) for name in CRITERIA}
    parts |= {"kl": mean(kls), "length": mean(lengths)}
    out: dict[str, Any] = {"n": len(rows)}
    for name, (value, interval) in parts.items():
        out |= {name: value, f"{name}_ci": interval}
    kinds = {kind: [row["all"] for row in rows if row["kind"] == kind] for kind in world.KINDS}
    tables = {kind: (share(hits), len(hits)) for kind, hits in kinds.items()}
    return out | {
        "kinds": {kind: {"all": p, "all_ci": ci, "n": n} for kind, ((p, ci), n) in tables.items()}
    }


def make_gold_evaluation(
    config: Any,
    tokenizer: Tokenizer,
    n: int = 256,
    reference: ModelConfig | None = None,
) -> Callable[[Params, Params], dict[str, float]]:
    """evaluate(params, reference) -> gold shares, distinct answers, KL on `n` held-out prompts, as `gold/...`.

    `config`: a script's, with `model`, `temperature`, `max_prompt`, `max_new_tokens` and `seed`; `reference` as above.
    """
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    measure = make_measure(
        config.model, sampling, tokenizer, config.max_prompt, reference=reference
    )
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(n)]

    def evaluate(params: Params, reference: Params) -> dict[str, float]:
        responses, _, kls = zip(
            *measure(params, reference, [r.text for r in requests], config.seed), strict=True
        )
        rows = gold_rows(requests, responses)
        shares = {f"gold/{name}": float(np.mean([row[name] for row in rows])) for name in CRITERIA}
        return shares | {
            "gold/distinct": distinct_answers(requests, responses),
            "gold/kl": float(np.mean(kls)),
        }

    return evaluate
