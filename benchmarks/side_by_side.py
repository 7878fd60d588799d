"""What the benchmarks beside a peer share: models by platform, interleaved timing, one table, one JSON file.

python -m benchmarks.side_by_side              # writes the README's table anew from benchmarks/results/
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
PEAKS = {  # by a part of the device's name: bfloat16 FLOP/s, bytes/s (the makers' data sheets)
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
    """Whether this is a run without an accelerator."""
    return jax.default_backend() == "cpu"


def peaks() -> tuple[float, float] | None:
    """FLOP/s and bytes/s of the device; None where no table has them (a CPU)."""
    return next(
        (peak for name, peak in PEAKS.items() if name in jax.devices()[0].device_kind), None
    )


def random_params(model: ModelConfig, seed: int = 0) -> Params:
    """Random float32 parameters."""
    return jax.jit(init_and_apply(LanguageModel(model))[0])(jax.random.key(seed))


def count(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def plain_batch(
    model: ModelConfig, rows: int, length: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of random tokens, all real, and all but the first predicted."""
    shape = (rows, length)
    return {
        "tokens_BT": np.random.default_rng(seed).integers(3, model.vocab, shape, np.int32),
        "loss_mask_BT": np.broadcast_to(np.float32(np.arange(length) > 0), shape),
        "segment_ids_BT": np.ones(shape, np.int32),
        "positions_BT": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    }


def _serve(pipe: Any, build: Callable[..., Sequence[Call]], args: tuple[Any, ...]) -> None:
    """Does what it is asked for, in a peer's process."""
    try:
        calls = build(*args)
        pipe.send(len(calls))
        while True:
            pipe.send(calls[pipe.recv()]())
    except EOFError:  # nobody asks any more
        pass
    except BaseException as fault:  # told where the call was made
        pipe.send(fault)


def apart(build: Callable[..., Sequence[Call]], *args: Any) -> list[Call]:
    """The calls that `build(*args)` gives, made in a process of their own; they return what can be pickled.

    In one process with PyTorch a PPO iteration of ours took 13 % longer than alone: threads and memory are shared.
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


def seconds_of(call: Call, at_least: float) -> float:
    """Seconds of one call, averaged over as many as fill `at_least`; a call returns when its work is done."""
    time.sleep(0.3)  # the other process's threads may still be spinning
    call()  # after a pause: caches, and pages that went back to the system
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < at_least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def interleaved(rows: Sequence[dict[str, Any]], rounds: int, at_least: float = 1.0) -> None:
    """Fills "seconds" of each row, a dict with "calls" by name: all of them once a round, after one that warms up.

    In odd rounds their order is reversed, so that nobody always comes after the same one.
    """
    every = [(row, name) for row in rows for name in row["calls"]]
    for row, name in every:
        row["calls"][name]()
        row.setdefault("seconds", {})[name] = []
    for turn in range(rounds):
        for row, name in every[:: -1 if turn % 2 else 1]:
            row["seconds"][name].append(seconds_of(row["calls"][name], at_least))


def speed_ratios(row: dict[str, Any], ours: str, peer: str) -> list[float]:
    """How many times as fast as `peer` `ours` was, in each round."""
    return [b / a for a, b in zip(row["seconds"][ours], row["seconds"][peer], strict=True)]


def report(
    name: str,
    config: Any,
    rows: Sequence[dict[str, Any]],
    packages: Sequence[str],
    loads: list[float],
) -> None:
    """Prints the table and writes `<name>-<platform>.json`; a row's first call is ours, each other a peer.

    A row has "what", "calls", "tokens" of one call and "seconds" of every call (`interleaved`), and what else it may.
    """
    versions = {
        package: importlib.metadata.version(package) for package in ("jax", "jaxlib", *packages)
    }
    print(
        f"{name}: {jax.devices()[0].device_kind}, {' '.join(f'{k} {v}' for k, v in versions.items())}"[
            :79
        ]
    )
    print(f"{'':30}{'ms':>10}{'tokens/s':>10}  times as fast as")
    for row in rows:
        ours, *peers = row.pop("calls")
        row |= {"ms": 1e3 * statistics.median(row["seconds"][ours]), "faster_than": {}}
        row["tokens_per_s"] = 1e3 * row["tokens"] / row["ms"]
        for peer in peers:
            ratios = speed_ratios(row, ours, peer)
            row["faster_than"][peer] = [statistics.median(ratios), min(ratios), max(ratios)]
        words = [
            f"{peer} {x[0]:.2f} ({x[1]:.2f}-{x[2]:.2f})" for peer, x in row["faster_than"].items()
        ]
        words += [f"{key} {row[key]:.2f}" for key in ("mfu", "of_roofline") if key in row]
        for i, word in enumerate(words or [""]):
            line = (
                f"{row['what']:30}{row['ms']:10.1f}{row['tokens_per_s']:10.0f}"
                if i == 0
                else " " * 50
            )
            print(f"{line}  {word}")
    folder = pathlib.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind,
        "platform_version": jax.devices()[0].client.platform_version.splitlines()[0],
        "cores": os.cpu_count(),
        "load_average": [*loads, os.getloadavg()[0]],
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"python": sys.version.split()[0], **versions},
        "config": {
            key: value for key, value in dataclasses.asdict(config).items() if key != "out"
        },
        "rows": rows,
    }
    (folder / f"{name}-{jax.default_backend()}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


def markdown(folder: pathlib.Path) -> str:
    """The results of all benchmarks beside peers as a table."""
    lines = ["| device | what | ms | tokens/s | times as fast as |", "|---|---|---|---|---|"]
    for path in sorted(
        path for name in ("train", "decode", "ppo") for path in folder.glob(f"{name}-*.json")
    ):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            versions = result["versions"]
            ratios = [
                f"{peer} {versions.get(peer, '')}".strip()
                + " {:.2f} ({:.2f} to {:.2f})".format(*ratio)
                for peer, ratio in row["faster_than"].items()
            ]
            ratios += [f"{key} {row[key]:.2f}" for key in ("mfu", "of_roofline") if key in row]
            cells = (
                result["device"],
                row["what"].strip(),
                f"{row['ms']:,.1f}",
                f"{row['tokens_per_s']:,.0f}",
            )
            lines.append(f"| {' | '.join((*cells, '; '.join(ratios)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__.partition("\n")[0]
    ).parse_args()  # it takes no arguments
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text().partition("<!-- benchmarks -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    readme.write_text(
        f"{before}<!-- benchmarks -->\n{markdown(pathlib.Path(RESULTS))}\n<!-- end -->\n{after}"
    )
