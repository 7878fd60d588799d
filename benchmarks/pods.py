"""The plans of docs/pods.md: real models compiled for pods that are not here, and the tables made of them.

python benchmarks/pods.py                # writes the section of docs/pods.md from benchmarks/results/pods.json
python benchmarks/pods.py sft-8b ppo-8b  # compiles these first, one to five minutes each; `all` for all of them
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import config as flags  # noqa: E402
import plan  # noqa: E402
from config import UserError  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "pods.json", ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- written by benchmarks/pods.py: begin -->", "<!-- end -->"
ON_V5E = "--model.preset=llama3-8b --topology=v5e:16x16 --mesh.fsdp=64 --mesh.tensor=4"
ON_V5P = "--model.preset=llama3-70b --topology=v5p:8x8x8 --mesh.fsdp=128 --mesh.tensor=4"
ROLLOUT = "--batch_size=512 --max_prompt=512 --max_new_tokens=512 --minibatches=2"
LLAMA2_7B = "--model.preset=llama3-8b --model.vocab=32000 --model.hidden=11008 --model.kv_heads=32 --model.context=4096"
MODELS = {
    "sft-8b": f"train_sft {ON_V5E} --batch_size=512 --length=2048",
    "rm-8b": f"train_rm {ON_V5E} --batch_size=256 --length=2048",
    "ppo-8b": f"train_ppo {ON_V5E} {ROLLOUT}",
    "sft-70b": f"train_sft {ON_V5P} --batch_size=512 --length=4096",
    "rm-70b": f"train_rm {ON_V5P} --batch_size=256 --length=4096",
    "ppo-70b": f"train_ppo {ON_V5P} {ROLLOUT}",
}
SCALING = {
    f"scale-{chips}": f"train_sft --model.preset=llama3-8b --topology=v5e:{shape} --mesh.fsdp={chips} "
    "--batch_size=256 --length=1024"
    for chips, shape in ((16, "4x4"), (32, "4x8"), (64, "8x8"), (128, "8x16"), (256, "16x16"))
}
CASES = MODELS | SCALING


def table(rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def models_table(results: dict[str, str]) -> list[str]:
    """A line a plan."""
    rows = [["plan", "mesh", "verdict", "parameters and optimiser: compiler less rules", "compiled in", "a step"]]
    for name in MODELS:
        if text := results.get(name):
            first, *_, last = text.splitlines()
            gaps = re.findall(r"by the compiler \(([+-][\d.]+%)\)", text)
            step = re.search(r"^a step: ([^;]*)", text, re.MULTILINE)
            mesh, seconds = re.search(r"chips as ([^;]*);.*compiled in (\d+ s)", first).groups()
            rows.append([f"`{name}`", mesh, last, ", ".join(gaps), seconds, step[1] if step else "-"])
    return table(rows)


def scaling_table(results: dict[str, str]) -> list[str]:
    """Peak and traffic against the number of chips."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    rows = [["chips", "peak, GiB a chip", *(f"{kind} over fsdp, GB a chip (times)" for kind in kinds)]]
    for name in SCALING:
        if text := results.get(name):
            peak = re.search(r"peaks at ([\d.]+)", text)[1]
            moved = {k: f"{gb} ({n})" for k, n, gb in re.findall(r"update: (\S+) +fsdp +([\d,]+) +(\S+)", text)}
            rows.append([name.removeprefix("scale-"), peak, *(moved.get(kind, "-") for kind in kinds)])
    return table(rows)


def section(results: dict[str, str]) -> str:
    """The part of the page that this file writes."""
    commands = [f"{name:8} python plan.py {CASES[name]}" for name in MODELS if name in results]
    lines = [
        BEGIN, "## Plans of real models, compiled without a pod", "",
        "By the TPU's compiler on two CPU cores (`python benchmarks/pods.py all`); nothing has run on a TPU. What a "
        "step takes at least is a roofline of compute, memory and links, each fully overlapped: a bound, no forecast.",
        "", *models_table(results), "", "```", *commands, "```", "",
    ]  # fmt: skip
    if results.keys() & SCALING.keys():
        lines += [f"`{SCALING['scale-256']}` and the same on fewer chips, `--mesh.fsdp` their number:", "",
                  *scaling_table(results), ""]  # fmt: skip
    if "ppo-8b" in results:
        lines += ["The whole of `ppo-8b`:", "", "```", results["ppo-8b"], "```", ""]
    return "\n".join([*lines, END])


def main(names: list[str]) -> None:
    """Measures the cases named, then writes the page."""
    if unknown := [name for name in names if name not in CASES and name != "all"]:
        raise UserError(f"{unknown[0]}: unknown; choose of {', '.join(CASES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in CASES if "all" in names else names:
        results[name] = plan.main(CASES[name].split()).text
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text() if PAGE.exists() else "# Pods\n\n" + BEGIN + END + "\n"
    if BEGIN not in page:
        page = page.rstrip() + "\n\n" + BEGIN + END + "\n"
    before, rest = page.split(BEGIN, 1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(before + section(results) + rest.split(END, 1)[1])


if __name__ == "__main__":
    flags.ending_in_one_line(lambda: main(sys.argv[1:]))
