"""Where the time of a training step goes: each operation's own time, summed by part of the model.

    python -m benchmarks.step_profile

Prints a table; flags are those of benchmarks/train.py.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import command
from benchmarks.train import Config, our_parts

# Patterns of operations' names; the first that fits holds.
PARTS = {
    "attention: scores, softmax, values": (
        r"layers/attention/while|BK[A-Z]*,BK|BT[A-Z]*,BS|softmax|pallas"
    ),
    "attention: projections": r"layers/attention/.*dot_general",
    "attention: rope, copies, sums": r"layers/attention",
    "feed-forward: products": r"layers/mlp/.*dot_general",
    "feed-forward: the rest": r"layers/mlp",
    "unembedding": r"DV->",
    "layers: norms, residuals, what scan keeps": r"LanguageModel.*decoder",
    "loss": r"jvp\(\)",
}
REST = "optimiser and the rest"
STEPS = 3


def part_of(name: str) -> str:
    """Return the part of PARTS that an operation of this name belongs to."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    return REST


def profiled(run: Callable[[], Any]) -> list[Any]:
    """Return the events of JAX's profiler in the second of two calls of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            with jax.profiler.trace(f"{folder}/{turn}"):
                jax.block_until_ready(run())
        trace = next(pathlib.Path(folder, "1").rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = []
        for plane in planes:
            for line in plane.lines:
                events += line.events
    return events


def main(config: Config) -> None:
    """Compile the step, run it under JAX's profiler, print the table."""
    step, state, batch = our_parts(config)
    text = step.lower(state, batch).compile().as_text()
    # Names that the model's code gave the compiled operations.
    named = re.findall(r'^ *(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    names = dict(named)

    def run():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        return metrics

    spent = collections.Counter()
    for event in profiled(run):
        # Loops, calls and conditions contain others.
        contains_others = re.match("while|call|cond", event.name)
        if "hlo_op" in dict(event.stats) and not contains_others:
            part = part_of(names.get(event.name, ""))
            spent[part] += event.duration_ns / 1e6 / STEPS
    title = f"a step of {config.batch}x{config.length}"
    print(f"{title:44}{'ms':>8}  share")
    for part, ms in spent.most_common():
        print(f"{part:44}{ms:8.1f}  {ms / spent.total():5.3f}")


if __name__ == "__main__":
    main(command.parse(Config))
