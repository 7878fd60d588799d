"""Sampling beside transformers' generate with the same weights, and slot refill beside a fixed batch.

python benchmarks/decode.py                    # prints a table, writes benchmarks/results/decode-<platform>.json
"""

import dataclasses
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the root's modules, from wherever this is started

import jax
import numpy as np
from side_by_side import RESULTS, SMALL, count, interleaved, on_cpu, peaks, plain_batch, random_params, report

import config as flags
from generate import SamplingConfig, generate
from model import LanguageModel, ModelConfig, Params, pure
from presets import PRESETS

NEVER = -1  # no token is this: responses have full length, as the peer's


@dataclasses.dataclass(frozen=True)
class Config:
    batches: tuple[int, ...] = (16, 1) if on_cpu() else (64, 1)
    """Rows sampled together, a row of the table each."""
    prompt: int = 64 if on_cpu() else 1024
    """Tokens of a prompt."""
    new: int = 64 if on_cpu() else 256
    """Tokens sampled after it."""
    rounds: int = 7
    """Timings of each row; the median is reported."""
    peer: bool = True
    """Time transformers too, in the same run."""
    model: ModelConfig = SMALL if on_cpu() else PRESETS["llama3.2-1b"]
    """Default by platform."""
    out: str = RESULTS
    """Folder of the results."""


def our_sampler(config: Config, params: Params, prompts: dict[str, Any], new: int) -> Any:
    """A call that samples `new` tokens after each prompt, at temperature 1 from all tokens."""
    apply, sampling = pure(LanguageModel(config.model))[1], SamplingConfig(max_new_tokens=new)
    sample = jax.jit(lambda *args: generate(apply, config.model, *args, sampling, eos=NEVER, pad=0).response_BR)
    key = jax.random.key(0)

    def call() -> None:
        assert sample(params, prompts, key).block_until_ready().shape[1] == new

    return call


def fixed_rows(config: Config, params: Params, net: Any) -> list[dict[str, Any]]:
    """A row for each batch size, and one for its prefill."""
    rows = []
    for batch in config.batches:
        prompts = jax.device_put(plain_batch(config.model, batch, config.prompt))
        for what, new in (("generate", config.new), ("  of this, prefill", 1)):
            calls = {"plumb": our_sampler(config, params, prompts, new)}
            if net is not None:
                import peers

                calls["transformers"] = peers.sampler(net, np.asarray(prompts["tokens_BT"]), new)
            what = f"{what} {batch} x {config.prompt}+{new}"
            rows.append({"what": what, "calls": calls, "batch": batch, "tokens": batch * new})
    return rows


def add_roofline(config: Config, params: Params, rows: list[dict[str, Any]]) -> None:
    """Share of the memory's speed at which a decode step reads what it must: weights once, and each row's cache."""
    c, width = config.model, config.model.compute_dtype.itemsize
    weights = count(params) - c.vocab * c.width * (not c.tied)  # untied, of the embedding only some rows are read
    for whole, prefill in zip(rows[::2], rows[1::2], strict=True):
        cache = whole["batch"] * 2 * c.layers * c.kv_heads * c.head_width * (config.prompt + config.new / 2)
        whole["bytes_per_step"] = width * (weights + cache)
        spent = np.median(whole["seconds"]["plumb"]) - np.median(prefill["seconds"]["plumb"])
        whole["ms_per_step"] = 1e3 * spent / (config.new - 1)
        if peaks():
            whole["of_roofline"] = 1e3 * whole["bytes_per_step"] / peaks()[1] / whole["ms_per_step"]


def main(config: Config) -> None:
    """Times, prints and writes."""
    loads, params, net = [os.getloadavg()[0]], random_params(config.model), None
    if config.peer:
        import peers

        net = peers.llama(params, config.model, peers.DTYPE)
    rows = fixed_rows(config, params, net)
    interleaved(rows, config.rounds)
    add_roofline(config, params, rows)
    report("decode", config, rows, ("torch", "transformers") if config.peer else (), loads)


if __name__ == "__main__":
    flags.run(main, Config)
