"""The world's gold program on a model's responses: shares with intervals, KL, distinct answers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, get_args

import jax
import numpy as np

from data.batches import cut_left, pad_prompts
from data.tokenizer import Tokenizer
from evaluation.intervals import Interval, mean_interval, share_interval
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.policy import response_logprobs
from responses import full_parts, refuse_not_finite
from rollout import join_responses
from runtime.errors import require
from sampling import Samples, SamplingConfig, generate
from sharding import to_host
from tasks import world

Criterion = Literal["helpful", "honest", "harmless", "all"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# Prompts a call.
ROWS = 256
Batch = dict[str, jax.Array]


class SampledResponse(NamedTuple):
    """A response to one prompt."""

    text: str
    length: int
    """Tokens, its end token included."""
    kl: float
    """log p(response) - log reference(response), in nats: its mean is the KL to the reference."""


class GoldRow(TypedDict):
    """A response and what the gold program says of it."""

    prompt: str
    kind: str
    """One of world.KINDS."""
    response: str
    all: bool
    """Helpful, honest and harmless."""
    helpful: bool
    honest: bool
    harmless: bool


class PolicyConfig(Protocol):
    """The fields of a training script's Config that its gold evaluation samples with."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def temperature(self) -> float: ...
    @property
    def max_prompt(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...


# ---- Responses, and their KL to a reference ----


def make_kl_sampler(
    config: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    prompt_length: int,
    condition: Callable[[Batch], Batch] = lambda prompts: prompts,
    reference: ModelConfig | None = None,
) -> Callable[[Params, Params, Sequence[str], int], list[SampledResponse]]:
    """Make the sampler of one response to each prompt by a policy of shape `config`.

    Returns sample_with_kl(params, reference, prompts, seed) -> responses, in the order of prompts.
    `reference`: parameters that the KL is to. A prompt is a user's text or a list of messages, cut
    on its left to `prompt_length` tokens. Both models read log-probabilities at the temperature of
    `sampling`, before top-k and top-p.

    `condition`: the batch of prompts as the policy sees it; the reference sees them as they are.
    `reference` (of this function): the reference's shape, where it is not `config`. Raises
    UserError for prompts and responses longer than the model's context.
    """
    new_tokens = sampling.max_new_tokens
    require(
        prompt_length + new_tokens <= config.context,
        f"--max_prompt={prompt_length}, --max_new_tokens={new_tokens}: together more than the "
        f"model's context of {config.context}; lower one",
    )
    _, apply = init_and_apply(LanguageModel(config))
    _, reference_apply = init_and_apply(LanguageModel(reference or config))

    @jax.jit
    def sample(
        params: Params, reference: Params, prompts: Batch, key: jax.Array
    ) -> tuple[Samples, jax.Array]:
        samples = generate(
            apply,
            config,
            params,
            condition(prompts),
            key,
            sampling,
            eos=tokenizer.ends,
            pad=tokenizer.pad,
        )
        batch = join_responses(prompts, samples)
        reference_BR = response_logprobs(reference_apply, reference, batch, sampling.temperature)
        return samples, ((samples.logp_BR - reference_BR) * samples.mask_BR).sum(1)

    def sample_with_kl(
        params: Params, reference: Params, prompts: Sequence[str], seed: int
    ) -> list[SampledResponse]:
        tokens = [cut_left(tokenizer.prompt(text), prompt_length, tokenizer) for text in prompts]
        responses: list[SampledResponse] = []
        for start, part in full_parts(tokens, ROWS):
            # One width and one number of rows: one program.
            padded = [{"tokens": row} for row in part]
            batch = pad_prompts(padded, prompt_length, tokenizer.pad, fixed=True)
            key = jax.random.fold_in(jax.random.key(seed), start)
            samples, kl_B = to_host(sample(params, reference, batch, key))
            refuse_not_finite(samples.logp_BR)

            # Responses without their padding.
            for response_R, mask_R, kl in zip(
                samples.response_BR, samples.mask_BR, kl_B, strict=True
            ):
                length = int(mask_R.sum())
                text = tokenizer.decode(response_R[:length].tolist())
                responses.append(SampledResponse(text, length, float(kl)))
        return responses[: len(prompts)]

    return sample_with_kl


# ---- What the gold program says ----


def gold_rows(requests: Sequence[world.Request], responses: Sequence[str]) -> list[GoldRow]:
    """Score each response to its request by the gold program; one row each, in order."""
    rows: list[GoldRow] = []
    for request, response in zip(requests, responses, strict=True):
        gold = world.gold(request.text, response)
        row: GoldRow = {
            "prompt": request.text,
            "kind": request.kind,
            "response": response,
            "all": bool(gold.all),
            "helpful": bool(gold.helpful),
            "honest": bool(gold.honest),
            "harmless": bool(gold.harmless),
        }
        rows.append(row)
    return rows


def gold_shares(rows: Sequence[GoldRow]) -> dict[str, Interval]:
    """Return the share of rows that meet each of CRITERIA."""
    return {name: share_interval([row[name] for row in rows]) for name in CRITERIA}


def distinct_answers(requests: Sequence[world.Request], responses: Sequence[str]) -> float:
    """Count the distinct answers given to lookups, as a share of the distinct right ones.

    Far below 1 where a policy has collapsed to few answers. 0 without lookups.
    """
    right = set()
    given = set()
    for request, response in zip(requests, responses, strict=True):
        if request.kind == "lookup":
            right.add(request.answer)
            given.add(world.extract_answer(request, response))
    return len(given - {None}) / max(len(right), 1)


def summarise(
    rows: Sequence[GoldRow], lengths: Sequence[int], kls: Sequence[float]
) -> dict[str, Any]:
    """Summarise one model's responses: a part of summary.json.

    `lengths` and `kls`: of each response, as in SampledResponse. Returns `n`, the CRITERIA as
    shares, `kl` and `length` as means, each with its interval [low, high] as `<name>_ci`, and
    `kinds`: {kind of request: {"all", "all_ci", "n"}}.
    """
    # Over all requests.
    summary: dict[str, Any] = {"n": len(rows)}
    intervals = gold_shares(rows)
    intervals |= {"kl": mean_interval(kls), "length": mean_interval(lengths)}
    for name, interval in intervals.items():
        summary[name] = interval.value
        summary[f"{name}_ci"] = interval.ends

    # By kind of request.
    summary["kinds"] = {}
    for kind in world.KINDS:
        hits = [row["all"] for row in rows if row["kind"] == kind]
        share = share_interval(hits)
        summary["kinds"][kind] = {"all": share.value, "all_ci": share.ends, "n": len(hits)}
    return summary


def make_gold_evaluation(
    config: PolicyConfig,
    tokenizer: Tokenizer,
    n: int = 256,
    reference: ModelConfig | None = None,
) -> Callable[[Params, Params], dict[str, float]]:
    """Make the evaluation of a script's policy on the world's first `n` held-out prompts.

    Returns evaluate(params, reference) -> metrics `gold/<criterion>` (shares), `gold/distinct`
    (`distinct_answers`) and `gold/kl` (nats a response). `reference` as in `make_kl_sampler`.
    """
    # The prompts are the same at every evaluation, and so are the keys.
    sampling = SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens)
    sample_with_kl = make_kl_sampler(
        config.model, sampling, tokenizer, config.max_prompt, reference=reference
    )
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(n)]
    prompts = [request.text for request in requests]

    def evaluate(params: Params, reference: Params) -> dict[str, float]:
        responses = sample_with_kl(params, reference, prompts, config.seed)
        texts = [response.text for response in responses]
        rows = gold_rows(requests, texts)
        metrics = {}
        for name in CRITERIA:
            metrics[f"gold/{name}"] = float(np.mean([row[name] for row in rows]))
        metrics["gold/distinct"] = distinct_answers(requests, texts)
        metrics["gold/kl"] = float(np.mean([response.kl for response in responses]))
        return metrics

    return evaluate
