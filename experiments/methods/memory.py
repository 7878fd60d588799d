"""Measure memory and time of PPO, GRPO, RAFT and DPO at equal size: a few steps of 32 responses.

    python -m experiments.methods.memory --align=runs/align0

Models have 32 million parameters and random weights (the world's are too small to be seen beside
the program itself). The peak is that of resident memory when the last but one step is done, before
anything is saved.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from experiments.child import check_ended
from runtime import flags
from runtime.errors import UserError
from runtime.rows import read_rows

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHAPE = tuple(
    f"--model.{name}={n}"
    for name, n in {
        "width": 512,
        "mlp_width": 2048,
        "layers": 8,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 64,
    }.items()
)
ROWS = ("--batch_size=32",)
DIRECT = ("train_dpo.py", "--batch_size=8", "--length=32")  # four candidates a prompt
METHODS = {
    "ppo": ("train_ppo.py", *ROWS, "--minibatches=1"),
    "grpo": ("train_grpo.py", *ROWS, "--minibatches=1"),
    "raft": ("train_raft.py", *ROWS, "--minibatch_size=32"),
    "dpo_cached": (*DIRECT, "--reference=cached"),
    "dpo_online": (*DIRECT, "--reference=online"),
}
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Config:
    align: str = "runs/align0"
    """Run of `make align`, of which comparisons.jsonl is read."""
    out: str = "runs/methods/memory"
    """Folder for the runs."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of the methods that are measured."""


def run(words: list[str], folder: pathlib.Path) -> dict[str, float]:
    """Return CPU seconds of a step, and peak MB, before the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        quick = [f"--steps={STEPS}", "--optimizer.warmup=0", "--eval_every=0", "--save_every=0"]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:], f"--run={folder}", *quick],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        peak = 0.0
        spent = {}
        while process.poll() is None:
            done = len(read_rows(str(folder)))  # a row is written when the next step is recorded
            if done >= STEPS:
                break
            seen = pathlib.Path(f"/proc/{process.pid}")
            spent[done] = sum(
                map(int, seen.joinpath("stat").read_text().rsplit(")")[-1].split()[11:13])
            )
            status = seen.joinpath("status").read_text().splitlines()
            peak = next(
                (int(line.split()[1]) / 1e3 for line in status if line.startswith("VmHWM")), peak
            )
            time.sleep(0.02)
        process.wait()
    code = process.returncode
    check_ended(code, f"{log}: the run ended with {code}; its last lines say why")
    # The first two steps may compile, the last one saves.
    ticks = (spent[STEPS - 1] - spent[2]) / (STEPS - 3)
    return {"cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"), "peak_mb": peak}


def main(config: Config) -> dict[str, dict[str, float]]:
    """Bring memory.json up to date; return what is in it."""
    if unknown := set(config.methods) - METHODS.keys():
        raise UserError(
            f"--methods: {', '.join(sorted(unknown))} unknown; choose of {', '.join(METHODS)}"
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    out = pathlib.Path(config.out)
    data = f"--data={config.align}/comparisons.jsonl"
    path = HERE / "memory.json"
    start = f"--init={out / 'sft'}"
    if not (out / "rm" / "checkpoints").exists():
        run(["train_sft.py", "--batch_size=8", *SHAPE], out / "sft")
        run(["train_rm.py", start, data, "--batch_size=8"], out / "rm")
    table = json.loads(path.read_text()) if path.exists() else {}
    for name in config.methods:
        script, *options = METHODS[name]
        source = data if script == "train_dpo.py" else f"--reward={out / 'rm'}"
        table[name] = run([script, start, source, *options], out / name)
        print(
            f"{name:12} {table[name]['cpu_seconds']:8.2f} CPU s {table[name]['peak_mb']:8.0f} MB",
            flush=True,
        )
    path.write_text(json.dumps(table, indent=1) + "\n")
    return table


if __name__ == "__main__":
    flags.run(main, Config)
