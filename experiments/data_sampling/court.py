"""Judge many small policies at a time: each answers its own held-out prompts, side by side."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data.batches import Batch, cut_left, pad_prompts
from data.tokenizer import Tokenizer
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from responses import refuse_not_finite
from sampling import Samples, SamplingConfig, generate
from sharding import to_host
from tasks import world

HELD_OUT = 1000
"""Added to a run's seed: that of its held-out prompts."""
MAX_PROMPT = 24
"""Longest prompt, in tokens."""


class Verdict(NamedTuple):
    """What the gold program says of a policy, a mean over prompts each."""

    gold: float
    """Share of responses that pass all criteria."""
    criteria: float
    """Share of the criteria that a response passes."""
    win_rate: float
    """Share of prompts where more criteria pass than of the demonstrator's response; ties half."""
    length: float
    """Tokens of a response, its end included."""


Judge = Callable[[Params, Sequence[int]], list[Verdict]]


@functools.cache
def make_court(model: ModelConfig, tokenizer: Tokenizer, prompts: int, new_tokens: int) -> Judge:
    """Make judge(params, seeds) -> a Verdict of each member.

    `params`: of the members, [M, ...]. `seeds`, M: of each one's prompts, demonstrators and
    samples. Members of one seed see the same prompts and draw with the same noise. Responses have
    at most `new_tokens` tokens and are drawn at temperature 1.
    """
    _, apply = init_and_apply(LanguageModel(model))
    sampling = SamplingConfig(1.0, max_new_tokens=new_tokens)

    def sample(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> Samples:
        ends = tokenizer.ends
        return generate(apply, model, params, batch, key, sampling, eos=ends, pad=tokenizer.pad)

    sample_all = jax.jit(jax.vmap(sample))

    def judge(params: Params, seeds: Sequence[int]) -> list[Verdict]:
        # Every member's prompts in one batch [M, B, T].
        requests = [held_out(seed, prompts) for seed in seeds]
        batches = [padded(own, tokenizer) for own in requests]
        batch = {name: np.stack([own[name] for own in batches]) for name in batches[0]}
        keys = jax.vmap(jax.random.key)(np.array(seeds))
        samples = to_host(sample_all(params, batch, keys))
        refuse_not_finite(samples.logp_BR)

        # Each member's responses, as texts.
        verdicts = []
        for member, seed in enumerate(seeds):
            lengths_B = samples.mask_BR[member].sum(1).astype(int)
            rows = zip(samples.response_BR[member], lengths_B, strict=True)
            texts = [tokenizer.decode(response[:length].tolist()) for response, length in rows]
            mean_length = float(lengths_B.mean())
            verdicts.append(judged(requests[member], texts, seed, mean_length))
        return verdicts

    return judge


def held_out(seed: int, count: int) -> list[world.Request]:
    """Return the held-out prompts of a run's seed."""
    return [world.prompt(i, split="heldout", seed=HELD_OUT + seed) for i in range(count)]


def padded(requests: Sequence[world.Request], tokenizer: Tokenizer) -> Batch:
    """Make a batch [B, T] of requests, padded on the left."""
    rows = []
    for request in requests:
        tokens = cut_left(tokenizer.prompt(request.text), MAX_PROMPT, tokenizer)
        rows.append({"tokens": tokens})
    return pad_prompts(rows, MAX_PROMPT, tokenizer.pad, fixed=True)


def judged(
    requests: Sequence[world.Request], texts: Sequence[str], seed: int, length: float
) -> Verdict:
    """Judge one policy's responses, beside those of the demonstrators to the same prompts."""
    passed = []
    criteria = []
    wins = []
    for i, (request, text) in enumerate(zip(requests, texts, strict=True)):
        ours = world.gold(request.text, text)
        shown = world.demonstration(i, split="heldout", seed=HELD_OUT + seed)
        theirs = world.gold(request.text, shown["response"])
        passed.append(ours.all)
        criteria.append(ours.total)
        # 1 for more criteria than the demonstrator, 1/2 for as many, 0 for fewer.
        sign = np.sign(sum(ours) - sum(theirs))
        wins.append(0.5 * (1 + sign))
    return Verdict(
        gold=float(np.mean(passed)),
        criteria=float(np.mean(criteria)),
        win_rate=float(np.mean(wins)),
        length=length,
    )
