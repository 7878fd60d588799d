"""The gold evaluation of a policy that is asked for a quantile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from data.tokenizer import Tokenizer
from evaluation.gold import CRITERIA, distinct_answers, gold_rows, make_kl_sampler
from experiments.quark.quark import conditioned
from model import Params
from sampling import SamplingConfig
from tasks import world


def make_asking_gold_evaluation(
    config: Any, tokenizer: Tokenizer, word: jax.Array | int, n: int = 256
) -> Callable[[Params, Params], dict[str, float]]:
    """Return evaluate(policy, reference) -> metrics, as of evaluation.gold.make_gold_evaluation.

    The policy is asked for the quantile `word`, a token; the reference sees the prompts alone.
    """
    measure = make_kl_sampler(
        config.model,
        SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens),
        tokenizer,
        config.max_prompt,
        partial(conditioned, system=tokenizer.system, word=word),
    )
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(n)]
    texts = [request.text for request in requests]

    def evaluate(policy: Params, reference: Params) -> dict[str, float]:
        measured = measure(policy, reference, texts, config.seed)
        responses, _, kls = zip(*measured, strict=True)
        rows = gold_rows(requests, responses)
        shares = {f"gold/{name}": float(np.mean([row[name] for row in rows])) for name in CRITERIA}
        return {
            **shares,
            "gold/distinct": distinct_answers(requests, responses),
            "gold/kl": float(np.mean(kls)),
        }

    return evaluate
