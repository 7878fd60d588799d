"""Where the time of a training step goes: each operation's own time, summed by the part of the model it is of.

python -m benchmarks.step_profile              # prints a table; flags are train.py's
"""

import collections
import pathlib
import re
import tempfile

import jax

from benchmarks.train import Config, our_parts
from runtime import flags

PARTS = {  # by a part of the operation's name; the first that fits
    "attention: scores, softmax, values": r"layers/attention/while|BK[A-Z]*,BK|BT[A-Z]*,BS|softmax|pallas",
    "attention: projections": r"layers/attention/.*dot_general",
    "attention: rope, copies, sums": r"layers/attention",
    "feed-forward: products": r"layers/mlp/.*dot_general",
    "feed-forward: the rest": r"layers/mlp",
    "unembedding": r"DV->",
    "layers: norms, residuals, what scan keeps": r"LanguageModel.*decoder",
    "loss": r"jvp\(\)",
}
STEPS = 3


def part_of(name: str) -> str:
    """The part of PARTS that an operation of this name belongs to."""
    return next(
        (part for part, pattern in PARTS.items() if re.search(pattern, name)),
        "optimiser and the rest",
    )


def main(config: Config) -> None:
    """Compiles, runs under JAX's profiler, and prints."""
    step, state, batch = our_parts(config)
    text = step.lower(state, batch).compile().as_text()
    names = dict(
        re.findall(r'^ *(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE)
    )
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):  # the first warms up
            with jax.profiler.trace(f"{folder}/{turn}"):
                for _ in range(STEPS):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
        trace = next(pathlib.Path(folder, "1").rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    spent = collections.Counter()
    for event in events:
        if "hlo_op" in dict(event.stats) and not re.match(
            "while|call|cond", event.name
        ):  # which contain others
            spent[part_of(names.get(event.name, ""))] += event.duration_ns / 1e6 / STEPS
    print(f"{'a step of ' + str(config.batch) + 'x' + str(config.length):44}{'ms':>8}  share")
    for part, ms in spent.most_common():
        print(f"{part:44}{ms:8.1f}  {ms / spent.total():5.3f}")


if __name__ == "__main__":
    flags.run(main, Config)
