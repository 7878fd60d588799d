"""Parts of the benchmarks beside a peer: models, interleaved timing, one table, one JSON file.

    python -m benchmarks.side_by_side

Writes the README's table anew from benchmarks/results/.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig

# A random Llama of 6.8 million parameters for two CPU cores, of 1.5 billion for an accelerator.
SMALL = ModelConfig("small", 4096, 256, 688, 6, 8, 8, 32, 1024, tied=False)
LARGE = ModelConfig("large", 32000, 2048, 5632, 28, 16, 8, 128, 8192, tied=False)
# By a part of the device's name: bfloat16 FLOP/s, bytes/s (the makers' data sheets).
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "TPU v6": (918e12, 1.64e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5": (459e12, 2.77e12),
}
RESULTS = str(pathlib.Path(__file__).parent / "results")
Call = Callable[[], Any]


def on_cpu() -> bool:
    """Return whether this is a run without an accelerator."""
    return jax.default_backend() == "cpu"


def peaks() -> tuple[float, float] | None:
    """Return FLOP/s and bytes/s of the device; None where no table has them (a CPU)."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if name in kind:
            return peak
    return None


# ---- Models and batches ----


def random_params(model: ModelConfig, seed: int = 0) -> Params:
    """Return random float32 parameters."""
    init, _ = init_and_apply(LanguageModel(model))
    return jax.jit(init)(jax.random.key(seed))


def count(tree: Any) -> int:
    """Return how many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def plain_batch(
    model: ModelConfig, rows: int, length: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return a batch of random tokens [rows, length], all real, all but the first predicted."""
    shape = (rows, length)
    position_T = np.arange(length, dtype=np.int32)
    return {
        "tokens_BT": np.random.default_rng(seed).integers(3, model.vocab, shape, np.int32),
        "loss_mask_BT": np.broadcast_to(np.float32(position_T > 0), shape),
        "segment_ids_BT": np.ones(shape, np.int32),
        "positions_BT": np.broadcast_to(position_T, shape),
    }


# ---- A peer, in a process of its own ----


def _serve(pipe: Any, build: Callable[..., Sequence[Call]], args: tuple[Any, ...]) -> None:
    """Build the calls in a peer's process; run those whose numbers come through the pipe."""
    try:
        calls = build(*args)
        pipe.send(len(calls))
        while True:
            number = pipe.recv()
            pipe.send(calls[number]())
    # The benchmark has ended.
    except EOFError:
        pass
    # Raised where the call was made.
    except BaseException as fault:
        pipe.send(fault)


def apart(build: Callable[..., Sequence[Call]], *args: Any) -> list[Call]:
    """Return the calls that `build(*args)` returns, run in a process of their own.

    Their results are pickled. An error of the call, or of `build`, is raised here.

    In one process with PyTorch a PPO iteration of ours took 13 % longer than alone: threads and
    memory are shared.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, build, args), daemon=True).start()
    theirs.close()

    def answer() -> Any:
        result = ours.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def ask(number: int) -> Any:
        ours.send(number)
        return answer()

    return [partial(ask, number) for number in range(answer())]


# ---- Timing ----


def seconds_of(call: Call, at_least: float) -> float:
    """Return the seconds of one call, averaged over as many as fill `at_least` seconds.

    A call returns when its work is done.
    """
    # The other process's threads may still be spinning.
    time.sleep(0.3)
    # After a pause caches are cold, and pages went back to the system.
    call()
    calls = 0
    start = time.perf_counter()
    while calls == 0 or time.perf_counter() - start < at_least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def interleaved(rows: Sequence[dict[str, Any]], rounds: int, at_least: float = 1.0) -> None:
    """Time all calls of all rows once a round, after a first round that warms up.

    A row is a dict with "calls" by name; its "seconds" become lists by the same names. In odd
    rounds the order is reversed, so that no call always comes after the same one.
    """
    every = [(row, name) for row in rows for name in row["calls"]]
    for row, name in every:
        row["calls"][name]()
        row.setdefault("seconds", {})[name] = []
    for turn in range(rounds):
        for row, name in every[:: -1 if turn % 2 else 1]:
            seconds = seconds_of(row["calls"][name], at_least)
            row["seconds"][name].append(seconds)


def speed_ratios(row: dict[str, Any], ours: str, peer: str) -> list[float]:
    """Return how many times as fast as `peer` `ours` was, in each round."""
    seconds = row["seconds"]
    return [theirs / mine for mine, theirs in zip(seconds[ours], seconds[peer], strict=True)]


def summarise(row: dict[str, Any], ours: str, peers: Sequence[str]) -> None:
    """Add to a timed row its "ms", "tokens_per_s" and "faster_than".

    The last maps each peer to the median, least and greatest ratio of speeds.
    """
    row["ms"] = 1e3 * statistics.median(row["seconds"][ours])
    row["faster_than"] = {}
    row["tokens_per_s"] = 1e3 * row["tokens"] / row["ms"]
    for peer in peers:
        ratios = speed_ratios(row, ours, peer)
        row["faster_than"][peer] = [statistics.median(ratios), min(ratios), max(ratios)]


# ---- Results ----


def shares(row: dict[str, Any]) -> list[str]:
    """Return the row's shares of the chip's peaks, as words; none on a CPU."""
    return [f"{name} {row[name]:.2f}" for name in ("mfu", "of_roofline") if name in row]


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table, with a line for each peer and each share."""
    words = []
    for peer, (median, least, greatest) in row["faster_than"].items():
        words.append(f"{peer} {median:.2f} ({least:.2f}-{greatest:.2f})")
    words += shares(row)
    start = f"{row['what']:30}{row['ms']:10.1f}{row['tokens_per_s']:10.0f}"
    for word in words or [""]:
        print(f"{start}  {word}")
        start = " " * 50


def report(
    name: str,
    config: Any,
    rows: Sequence[dict[str, Any]],
    packages: Sequence[str],
    loads: list[float],
) -> None:
    """Print the table and write `<name>-<platform>.json` in the folder `config.out`.

    A row has "what" to call it, "calls", "tokens" of one call and the "seconds" of every call
    (`interleaved`); other keys are written too. Its first call is ours, each other is a peer.
    `packages` are the peers', `loads` the load averages before.
    """
    versions = {
        package: importlib.metadata.version(package) for package in ("jax", "jaxlib", *packages)
    }
    device = jax.devices()[0]
    named = " ".join(f"{package} {version}" for package, version in versions.items())
    print(f"{name}: {device.device_kind}, {named}"[:79])
    print(f"{'':30}{'ms':>10}{'tokens/s':>10}  times as fast as")
    for row in rows:
        ours, *peers = row.pop("calls")
        summarise(row, ours, peers)
        print_row(row)

    described = dataclasses.asdict(config)
    del described["out"]
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "platform_version": device.client.platform_version.splitlines()[0],
        "cores": os.cpu_count(),
        "load_average": [*loads, os.getloadavg()[0]],
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"python": sys.version.split()[0], **versions},
        "config": described,
        "rows": rows,
    }
    folder = pathlib.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{jax.default_backend()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def markdown(folder: pathlib.Path) -> str:
    """Return the results of all benchmarks beside peers, in a folder, as a table."""
    paths = []
    for name in ("train", "decode", "rollout", "ppo"):
        paths += folder.glob(f"{name}-*.json")
    lines = ["| device | what | ms | tokens/s | times as fast as |", "|---|---|---|---|---|"]
    for path in sorted(paths):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            ratios = []
            for peer, (median, least, greatest) in row["faster_than"].items():
                named = f"{peer} {result['versions'].get(peer, '')}".strip()
                ratios.append(f"{named} {median:.2f} ({least:.2f} to {greatest:.2f})")
            cells = [
                result["device"],
                row["what"].strip(),
                f"{row['ms']:,.1f}",
                f"{row['tokens_per_s']:,.0f}",
                "; ".join(ratios + shares(row)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the README's table."""
    # There are no arguments; a typo must not write.
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text().partition("<!-- benchmarks -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    table = markdown(pathlib.Path(RESULTS))
    readme.write_text(f"{before}<!-- benchmarks -->\n{table}\n<!-- end -->\n{after}")


if __name__ == "__main__":
    main()
