"""Models, batches, chips' peaks and the README's table, for all benchmarks beside peers.

    python -m benchmarks.side_by_side

Writes the README's table anew from benchmarks/results/.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.rows import RESULTS, shares
from model import LanguageModel, Params, init_and_apply
from model_config import PRESETS, ModelConfig
from runtime.errors import require

SMALL = ModelConfig("small", 4096, 256, 688, 6, 8, 8, 32, 1024, tied=False)
MODELS = {
    # Random Llamas: of 6.8 million parameters for a few CPU cores; of 135 million and 1.5 billion
    # for an accelerator.
    "small": SMALL,
    "135m": ModelConfig("135m", 32000, 768, 2048, 12, 12, 12, 64, 1024, tied=False),
    "1.5b": ModelConfig("1.5b", 32000, 2048, 5632, 28, 16, 8, 128, 8192, tied=False),
    # For one where no more than 64 tokens are told apart: one token of them, the end, then ends
    # responses at 64 tokens on average, whoever samples.
    "small-64": dataclasses.replace(SMALL, preset="small-64", vocab=64),
    "135m-64": ModelConfig("135m-64", 64, 768, 2048, 12, 12, 12, 64, 1024, tied=False),
    **PRESETS,
}
# By a part of the device's name: bfloat16 FLOP/s, bytes/s (the makers' data sheets).
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "TPU v6": (918e12, 1.64e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5": (459e12, 2.77e12),
}


def model_of(name: str) -> ModelConfig:
    """Return a model of MODELS; raise UserError with the known names for another."""
    require(name in MODELS, f"--model={name}: unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def peaks(device: str) -> tuple[float, float] | None:
    """Return FLOP/s and bytes/s of the device of this name; None where no table has them."""
    for name, peak in PEAKS.items():
        if name in device:
            return peak
    return None


# ---- Models and batches ----


def random_params(model: ModelConfig, seed: int = 0) -> Params:
    """Return random float32 parameters."""
    init, _ = init_and_apply(LanguageModel(model))
    return jax.jit(init)(jax.random.key(seed))


def count(model: ModelConfig) -> int:
    """Return how many numbers the parameters of a language model are."""
    init, _ = init_and_apply(LanguageModel(model))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def plain_batch(
    model: ModelConfig, rows: int, length: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return a batch of random tokens [rows, length], all real, all but the first predicted."""
    shape = (rows, length)
    # The first ids are control tokens.
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(3, model.vocab, shape, np.int32)
    position_T = np.arange(length, dtype=np.int32)
    mask_T = np.float32(position_T > 0)
    return {
        "tokens_BT": tokens_BT,
        "loss_mask_BT": np.broadcast_to(mask_T, shape),
        "segment_ids_BT": np.ones(shape, np.int32),
        "positions_BT": np.broadcast_to(position_T, shape),
    }


# ---- The README's table ----


def measured_on(result: dict[str, Any]) -> str:
    """Return where and how well a file of results was measured, as a sentence."""
    # Over all rows: each library's rates of a matmul, its threads and its version.
    rates: dict[str, list[float]] = {}
    threads: dict[str, int] = {}
    versions: dict[str, str] = {}
    for row in result["rows"]:
        for library, rate in row.get("matmul_gflops", {}).items():
            rates.setdefault(library, []).append(rate)
        threads |= row.get("threads", {})
        for side in row["sides"].values():
            versions |= side["versions"]

    # The machine, and how much of it each side had.
    has = "1 core" if result["cores"] == 1 else f"{result['cores']} cores"
    cores = result["config"].get("cores")
    clock = f", each side on {cores}, seconds of its own work" if cores else ""
    before, *after = result["load_average"]
    most_after = max(after)

    # The libraries, and how fast each was there.
    named = ", ".join(f"{library} {version}" for library, version in versions.items())
    words = []
    for library, every in rates.items():
        least = min(every)
        greatest = max(every)
        plural = "s" if threads[library] > 1 else ""
        count = f"{threads[library]} thread{plural}"
        words.append(f"{library} {least:,.0f} to {greatest:,.0f} ({count})")
    rated = ", ".join(words) or "not recorded"
    return (
        f"{result['device']}, {has}{clock}; {result['date']}, {named}; load "
        f"{before:.1f} before, {most_after:.1f} at most after; GFLOP/s of a matmul in the same "
        f"rounds: {rated}."
    )


def line_cells(line: dict[str, Any]) -> list[str]:
    """Return a line's cells: what, ms, tokens/s, and how many times as fast as whom."""
    ratios = []
    for peer, (median, least, greatest) in line["faster_than"].items():
        ratios.append(f"{peer} {median:.2f} ({least:.2f} to {greatest:.2f})")
    return [
        line["what"].strip(),
        f"{line['ms']:,.1f}",
        f"{line['tokens_per_s']:,.0f}",
        "; ".join(ratios + shares(line)),
    ]


def markdown(folder: pathlib.Path) -> str:
    """Return the results of all benchmarks beside peers, in a folder, as tables."""
    parts = []
    for name in ("train", "decode", "ppo"):
        for path in sorted(folder.glob(f"{name}-*.json")):
            result = json.loads(path.read_text())
            parts.append(table_of(result))
    return "\n\n".join(parts)


def table_of(result: dict[str, Any]) -> str:
    """Return the table of one file of results, behind a sentence on where it was measured."""
    lines = [measured_on(result), ""]
    lines.append("| what | ms | tokens/s | times as fast as |")
    lines.append("|---|---|---|---|")
    for row in result["rows"]:
        for line in row.get("lines", []):
            cells = " | ".join(line_cells(line))
            lines.append(f"| {cells} |")
        # Sides that gave no number, and why.
        left_out = [f"{side}: {why}" for side, why in row["left_out"].items()]
        if "over_limit" in row:
            left_out.append(f"over its limit of {row['limit_s']:g} s: {row['over_limit']}")
        if left_out:
            why = "; ".join(left_out)
            lines.append(f"| {row['what']} | left out: {why} | | |")
    return "\n".join(lines)


def main() -> None:
    """Write the README's table."""
    # There are no arguments; a typo must not write.
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()

    # Between the page's marks.
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text("utf-8").partition("<!-- benchmarks -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    table = markdown(pathlib.Path(RESULTS))
    readme.write_text(f"{before}<!-- benchmarks -->\n{table}\n<!-- end -->\n{after}", "utf-8")


if __name__ == "__main__":
    main()
