"""A student fine-tuned on demonstrations, one distilled from the aligned teacher, and the teacher, by the gold program.

python experiments/distill/measure.py --align=runs/align --run=runs/distill --seed=1000
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the root's modules, from wherever this is started

import config as flags
from data import world
from generate import SamplingConfig, load_run
from gold import CRITERIA, judged, make_measure, summarise
from programs import forward_flops
from sharding import MeshConfig, make_mesh

MAX_PROMPT, MAX_NEW = 32, 24  # as evaluate.py


@dataclasses.dataclass(frozen=True)
class Config:
    align: str = "runs/align"
    """Run of `make align`, whose PPO policy is the teacher."""
    run: str = "runs/distill"
    """What run.sh made of it."""
    n: int = 1000
    """Held-out prompts."""
    seed: int = 1000
    """Of the prompts and of sampling."""


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Model -> gold shares with intervals, KL to the teacher, FLOPs of a token as a share of the teacher's."""
    make_mesh(MeshConfig())
    requests = [world.prompt(i, split="heldout", seed=config.seed) for i in range(config.n)]
    shape, _, teacher = load_run(f"{config.align}/ppo")
    runs = {"teacher": f"{config.align}/ppo", "student, SFT": f"{config.run}/sft"}
    runs["student, distilled"] = f"{config.run}/distilled"
    table = {}
    for name, run in runs.items():
        model, tokenizer, params = load_run(run)
        sampling = SamplingConfig(1.0, max_new_tokens=MAX_NEW)
        measure = make_measure(model, sampling, tokenizer, MAX_PROMPT, reference=shape)
        texts, lengths, kls = zip(*measure(params, teacher, [r.text for r in requests], config.seed), strict=True)
        table[name] = summarise(judged(requests, texts), lengths, kls)
        length = MAX_PROMPT + MAX_NEW
        table[name]["flops"] = forward_flops(model, 1, length, length) / forward_flops(shape, 1, length, length)
        shares = ", ".join(f"{c} {table[name][c]:.3f}" for c in CRITERIA)
        refused = table[name]["kinds"]["dangerous"]["all"]
        print(
            f"{name:19} {shares}, dangerous {refused:.3f}, KL {table[name]['kl']:.2f}, FLOPs {table[name]['flops']:.2f}"
        )
    (pathlib.Path(config.run) / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    flags.run(main, Config)
