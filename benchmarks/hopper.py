"""The Hopper kernels against float64 on small cases, and their time beside cuDNN's.

    python -m benchmarks.hopper

Writes benchmarks/results/hopper-<platform>.json after every row. tests/test_hopper.py has more
cases; here are those that take seconds, on machines without pytest too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention as timed_attention
from benchmarks import command
from benchmarks.absent import standing_in
from benchmarks.rows import RESULTS, Built, Row, Side, run_rows, within

with standing_in():
    from kernels.attention import attention

TOLERANCE = 1e-2
"""Largest error, of the largest magnitude: that of bfloat16 in the tests."""
CASES = {
    # Batch, tokens, query heads, key/value heads, width, ends of the segments.
    "width 128, packed": (2, 300, 4, 2, 128, (110, 180, 300)),
    "width 64": (1, 256, 4, 1, 64, ()),
    "width 256, packed": (1, 300, 2, 1, 256, (37, 300)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    implementation: str = "pallas_hopper"
    """Implementation that is checked and timed."""
    cases: tuple[str, ...] = tuple(CASES)
    """Cases that are compared with float64."""
    length: int = 4096
    """Tokens of a sequence that is timed."""
    tokens: int = 16384
    """Tokens of a batch that is timed."""
    heads: int = 16
    """Query heads; two share a key/value head."""
    width: int = 128
    """Head width."""
    rounds: int = 3
    """Timings of each side; medians are reported."""
    seconds: float = 0.2
    """Least duration of a timing, in seconds."""
    cores: int = 0
    """Cores that each side is held to, whose own seconds are then counted; 0: all, and the seconds
    that pass. On a shared CPU take 1."""
    row_limits: tuple[float, ...] = (60.0,)
    """Most seconds of each row, start and compilation included; the last is for the rest too."""
    out: str = RESULTS
    """Folder of the results."""


# ---- Against float64 ----


def exact_head(
    q_TH: np.ndarray, k_SH: np.ndarray, v_SH: np.ndarray, dout_TH: np.ndarray, seen_TS: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return output, dq, dk and dv of one head, from the formulas, in the type of its factors."""
    # The weights: softmax of the scores of the keys that are seen.
    scale = q_TH.shape[-1] ** -0.5
    scores_TS = scale * q_TH @ k_SH.T
    scores_TS = np.where(seen_TS, scores_TS, -np.inf)
    weights_TS = np.exp(scores_TS - scores_TS.max(1, keepdims=True))
    weights_TS /= weights_TS.sum(1, keepdims=True)
    out_TH = weights_TS @ v_SH

    # Back through the softmax: d score = weight (d weight - its mean).
    dweights_TS = dout_TH @ v_SH.T
    mean_T1 = (weights_TS * dweights_TS).sum(1, keepdims=True)
    dscores_TS = scale * weights_TS * (dweights_TS - mean_T1)
    dq_TH = dscores_TS @ k_SH
    dk_SH = dscores_TS.T @ q_TH
    dv_SH = weights_TS.T @ dout_TH
    return out_TH, dq_TH, dk_SH, dv_SH


def exact(arrays: list[np.ndarray], ids_T: np.ndarray) -> list[np.ndarray]:
    """Return output and gradients of causal attention in float64.

    `arrays`: q, k, v and a cotangent, [B, T, heads, H]; `ids_T`: the tokens' segments.
    """
    q_BTNH, k_BSKH, v_BSKH, dout_BTNH = arrays
    batch, length, heads, _ = q_BTNH.shape
    group = heads // k_BSKH.shape[2]

    # Earlier tokens of the same segment, and the token itself.
    is_causal_TS = np.tril(np.ones((length, length), bool))
    is_same_TS = ids_T[:, None] == ids_T
    seen_TS = is_causal_TS & is_same_TS

    # Head by head; a key/value head's gradients are summed over its group's.
    out_BTNH = np.zeros(q_BTNH.shape)
    dq_BTNH = np.zeros(q_BTNH.shape)
    dk_BSKH = np.zeros(k_BSKH.shape)
    dv_BSKH = np.zeros(v_BSKH.shape)
    for b, n in np.ndindex(batch, heads):
        k = n // group
        own = (q_BTNH[b, :, n], k_BSKH[b, :, k], v_BSKH[b, :, k], dout_BTNH[b, :, n])
        out_TH, dq_TH, dk_SH, dv_SH = exact_head(*own, seen_TS)
        out_BTNH[b, :, n] = out_TH
        dq_BTNH[b, :, n] = dq_TH
        dk_BSKH[b, :, k] += dk_SH
        dv_BSKH[b, :, k] += dv_SH
    return [out_BTNH, dq_BTNH, dk_BSKH, dv_BSKH]


def checked(what: str, case: str, implementation: str) -> Built:
    """Return a side that has been compared with float64; raise AssertionError for an error."""
    # Queries, keys, values and a cotangent, and the segment of each token.
    batch, length, heads, kv_heads, width, ends = CASES[case]
    rng = np.random.default_rng(0)
    arrays = []
    for n in (heads, kv_heads, kv_heads, heads):
        drawn = rng.normal(size=(batch, length, n, width))
        arrays.append(jnp.asarray(drawn, jnp.bfloat16))
    ids_T = 1 + np.searchsorted(ends[:-1], np.arange(length), side="right")
    packed = {"segment_ids": np.tile(ids_T, (batch, 1))} if ends else {}

    # Both passes of the kernels, and of float64 on the same rounded arrays.
    kernel = functools.partial(attention, implementation=implementation, **packed)
    run = jax.jit(timed_attention.both_passes(kernel))
    got = run(*arrays)
    want = exact([np.asarray(x, np.float64) for x in arrays], ids_T)

    # The largest error of each result, beside the largest magnitude.
    errors = {}
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        largest = np.abs(other).max()
        error = np.abs(np.asarray(one, np.float64) - other).max()
        errors[name] = float(error / largest)
    assert max(errors.values()) < TOLERANCE, f"errors of the largest magnitude: {errors}"

    def call() -> None:
        jax.block_until_ready(run(*arrays))

    return Built({what: call}, "jax", facts={"errors": errors})


# ---- The benchmark ----


def rows(config: Config) -> list[Row]:
    """Return a row for each case, then the two passes beside what JAX offers."""
    found = []
    for case in config.cases:
        what = f"float64, {case}"
        batch, length, *_ = CASES[case]
        side = Side(checked, (what, case, config.implementation))
        found.append(Row(what, {config.implementation: side}, tokens={what: batch * length}))
    timed = timed_attention.Config(
        implementations=(config.implementation, "library"),
        lengths=(config.length,),
        tokens=config.tokens,
        heads=config.heads,
        width=config.width,
        segments=(1,),
    )
    return within([*found, *timed_attention.rows(timed)], config.row_limits)


def finish(result: dict[str, Any]) -> None:
    """Print the errors of the newest row; add TFLOP/s where there are FLOPs."""
    timed_attention.add_tflops(result)
    for side in result["rows"][-1]["sides"].values():
        if "errors" in side:
            words = ", ".join(f"{name} {error:.1e}" for name, error in side["errors"].items())
            print(f"errors: {words}")


def main(config: Config) -> dict[str, Any]:
    """Check, time and write; return what is written."""
    return run_rows("hopper", config, rows(config), finish)


if __name__ == "__main__":
    command.run(main, Config)
