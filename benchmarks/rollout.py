"""Rollouts in stages beside the plain loop: responses of unequal length, and all of full length.

    python -m benchmarks.rollout

Prints a table and writes benchmarks/results/rollout-<platform>.json.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from benchmarks.decode import NEVER, ending_tokens
from benchmarks.side_by_side import (
    RESULTS,
    SMALL,
    interleaved,
    on_cpu,
    plain_batch,
    random_params,
    report,
)
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig
from rollout import make_rollout
from runtime import flags
from sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = (64, 16) if on_cpu() else (256, 64)
    """Rows sampled together; the first are sampled at full length too."""
    prompt: int = 64 if on_cpu() else 256
    """Tokens of a prompt."""
    limit: int = 256 if on_cpu() else 1024
    """Most tokens of a response; where they end, their mean length is a quarter of it."""
    rounds: int = 5
    """Timings of each row; the median is reported."""
    model: ModelConfig = SMALL if on_cpu() else PRESETS["llama3.2-1b"]
    """Default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def rollout_row(config: Config, params: Params, batch: int, ending: bool) -> dict[str, Any]:
    """Return a row that samples in stages, beside one loop over all rows and columns.

    With `ending` the lengths of responses are geometric, a quarter of the limit on average;
    otherwise none ends.
    """
    # The same rollout twice.
    _, apply = init_and_apply(LanguageModel(config.model))
    sampling = SamplingConfig(max_new_tokens=config.limit)
    eos = ending_tokens(config.model.vocab, config.limit) if ending else NEVER
    how = {"eos": eos, "pad": 0}
    rollouts = {
        "plumb": make_rollout(apply, config.model, sampling, **how),
        "one stage": make_rollout(apply, config.model, sampling, in_stages=False, **how),
    }
    prompts = jax.device_put(plain_batch(config.model, batch, config.prompt))
    key = jax.random.key(0)

    def call_of(name: str) -> Any:
        return lambda: jax.block_until_ready(rollouts[name](params, prompts, key))

    # It gives the same tokens, but for rounding.
    calls = {name: call_of(name) for name in rollouts}
    mine, plain = (jax.device_get(call()) for call in calls.values())
    equal = np.mean(mine["response_BR"] == plain["response_BR"])
    assert equal > (1 if on_cpu() else 0.5) - 1e-3
    tokens = float(mine["mask_BR"].sum())
    lengths = "up to " if ending else ""
    return {
        "what": f"rollout {batch} x {config.prompt}+{lengths}{config.limit}",
        "calls": calls,
        "tokens": tokens,
        "mean_length": tokens / batch,
    }


def main(config: Config) -> None:
    """Time all rows, print the table, write the JSON."""
    loads = [os.getloadavg()[0]]
    params = random_params(config.model)
    rows = [rollout_row(config, params, batch, True) for batch in config.batches]
    rows.append(rollout_row(config, params, config.batches[0], False))
    interleaved(rows, config.rounds)
    report("rollout", config, rows, (), loads)


if __name__ == "__main__":
    flags.run(main, Config)
