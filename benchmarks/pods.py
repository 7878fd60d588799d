"""The plans of docs/pods.md: real models compiled for pods that are not here, and the tables made of them.

python -m benchmarks.pods                # writes the section of docs/pods.md from benchmarks/results/pods.json
python -m benchmarks.pods sft-8b ppo-8b  # compiles these first, half a minute to five each; `all` for all of them
"""

import contextlib
import io
import json
import pathlib
import re
import sys
import time

from model_config import ModelConfig
from planning import plan
from runtime import flags
from runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- written by benchmarks/pods.py: begin -->", "<!-- end -->"
ON_V5E = "--model.preset=llama3-8b --topology=v5e:16x16 --mesh.fsdp=64 --mesh.tensor=4"
ON_V5P = "--model.preset=llama3-70b --topology=v5p:8x8x8 --mesh.fsdp=128 --mesh.tensor=4"
ROLLOUT = "--batch_size=512 --max_prompt=512 --max_new_tokens=512 --minibatches=2"
MODELS = {
    "sft-8b": f"train_sft {ON_V5E} --batch_size=512 --length=2048",
    "rm-8b": f"train_rm {ON_V5E} --batch_size=256 --length=2048",
    "dpo-8b": f"train_dpo {ON_V5E} --batch_size=256 --length=1024",
    "ppo-8b": f"train_ppo {ON_V5E} {ROLLOUT}",
    "grpo-8b": f"train_grpo {ON_V5E} {ROLLOUT}",
    "sft-70b": f"train_sft {ON_V5P} --batch_size=512 --length=4096",
    "rm-70b": f"train_rm {ON_V5P} --batch_size=256 --length=4096",
    "ppo-70b": f"train_ppo {ON_V5P} {ROLLOUT}",
    "long-8b": "train_lm --model.preset=llama3-8b --model.context=32768 --topology=v5e:16x16 --mesh.data=1 "
    "--mesh.fsdp=16 --mesh.sequence=16 --batch_size=16 --length=32768",
    "sft-8b-v6e": f"train_sft {ON_V5E.replace('v5e', 'v6e')} --batch_size=512 --length=2048",
    "sft-1b-h200": "train_sft --model.preset=llama3.2-1b --topology=h200:8 --mesh.fsdp=8 --batch_size=64 --length=2048",
}
SCALING = {
    f"scale-{chips}": f"train_sft --model.preset=llama3-8b --topology=v5e:{shape} --mesh.fsdp={chips} "
    "--batch_size=256 --length=1024"
    for chips, shape in ((16, "4x4"), (32, "4x8"), (64, "8x8"), (128, "8x16"), (256, "16x16"))
}
SWEEP = (
    "train_sft --model.preset=llama3.2-1b --topology=h200:8 --batch_size=64 --length=2048 --sweep"
)
LLAMA2_7B = "--model.preset=llama3-8b --model.vocab=32000 --model.mlp_width=11008 --model.kv_heads=32 --model.context=4096"
ON_256 = "--topology=v5e:16x16 --mesh.fsdp=256 --length=2048"
ON_H200 = (
    "--model.preset=llama3.2-1b --model.tied=False --topology=h200:1 --batch_size=8 --length=2048"
)
# Peaks in GiB a chip of another decoder in plain JAX, measured in this way before; of its models only the sizes are
# known, so their shapes here are the published ones of these sizes.
REFERENCES = {
    "7b-256": (1.8, f"{LLAMA2_7B} {ON_256} --batch_size=256"),
    "7b-1024": (4.2, f"{LLAMA2_7B} {ON_256} --batch_size=1024"),
    "7b-2048": (7.7, f"{LLAMA2_7B} {ON_256} --batch_size=2048"),
    "7b-tensor": (10.4, f"{LLAMA2_7B} {ON_V5E.split(' ', 1)[1]} --batch_size=1024 --length=2048"),
    "70b-v5e": (10.2, f"--model.preset=llama3-70b {ON_256} --batch_size=256"),
    "70b-256": (
        13.3,
        "--model.preset=llama3-70b --topology=v5p:8x8x4 --mesh.fsdp=256 --batch_size=256 --length=4096",
    ),
    "70b-256-tensor": (
        16.3,
        "--model.preset=llama3-70b --topology=v5p:8x8x4 --mesh.fsdp=64 --mesh.tensor=4 --batch_size=128 --length=4096",
    ),
    "70b-512": (25.7, f"{ON_V5P} --batch_size=512 --length=4096"),
    "70b-512-tensor": (
        47.6,
        "--model.preset=llama3-70b --topology=v5p:8x8x8 --mesh.fsdp=64 --mesh.tensor=8 --batch_size=512 --length=4096",
    ),
    "1.5b-full": (24.1, f"{ON_H200} --model.remat=full"),
    "1.5b-dots": (35.1, f"{ON_H200} --model.remat=dots"),
    "1.5b-none": (60.8, f"{ON_H200} --model.remat=none"),
}
CASES = (
    MODELS
    | SCALING
    | {"sweep": SWEEP}
    | {name: f"train_sft {argv}" for name, (_, argv) in REFERENCES.items()}
)


KINDS = ("all-gather", "collective-permute", "reduce-scatter", "all-reduce")


def table(rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def peak(text: str) -> float:
    """GiB a chip, of the last line."""
    return float(re.search(r"peaks at ([\d.,]+) of", text)[1].replace(",", ""))


def models_table(results: dict[str, str]) -> list[str]:
    """A line a plan."""
    rows = [
        [
            "plan",
            "mesh",
            "verdict",
            "parameters and optimiser: compiler less rules",
            "compiled in",
            "a step",
        ]
    ]
    for name in MODELS:
        if text := results.get(name):
            first, last = (
                re.search(r"^.*chips as .*$", text, re.MULTILINE)[0],
                text.splitlines()[-1],
            )
            gaps = re.findall(r"by the compiler \(([+-][\d.]+%)\)", text)
            step = re.search(r"^a step: ([^;]*)", text, re.MULTILINE)
            mesh, seconds = re.search(r"chips as ([^;]*);.*compiled in (\d+ \S*s)", first).groups()
            rows.append(
                [f"`{name}`", mesh, last, ", ".join(gaps), seconds, step[1] if step else "-"]
            )
    return table(rows)


def traffic(text: str) -> dict[str, tuple[str, str, str]]:
    """Of the update over fsdp: kind -> (times, GB received, MB by the largest)."""
    found = re.findall(r"update: (\S+) +fsdp +([\d,]+) +(\S+) +(\S+)", text)
    return {kind: tuple(numbers) for kind, *numbers in found}


def scaling_table(results: dict[str, str]) -> list[str]:
    """Peak and traffic against the number of chips."""
    heads = (f"{kind} over fsdp: times, GB a chip, MB by the largest" for kind in KINDS)
    rows = [["chips", "peak, GiB a chip", *heads]]
    for name in SCALING:
        if text := results.get(name):
            moved = {kind: ", ".join(numbers) for kind, numbers in traffic(text).items()}
            rows.append(
                [
                    name.removeprefix("scale-"),
                    f"{peak(text):.2f}",
                    *(moved.get(kind, "-") for kind in KINDS),
                ]
            )
    return table(rows)


def scaling_remarks(results: dict[str, str]) -> list[str]:
    """What the table shows, in numbers of it."""
    texts = {
        int(name.removeprefix("scale-")): results[name] for name in SCALING if name in results
    }
    few, many, c = min(texts), max(texts), ModelConfig.from_preset("llama3-8b")
    held = {n: sum(float(x) for x in re.findall(r"^  (?:parameters|optimiser) +(\S+)$", text, re.MULTILINE))
            for n, text in texts.items()}  # fmt: skip
    model = (
        held[many] * many * 2**30 / 6 / 1e9
    )  # float32 parameters and two moments: of 12 bytes, 2 in bfloat16
    largest = (
        max(float(traffic(text)["all-gather"][2].replace(",", "")) for text in texts.values())
        / 1e3
    )
    times = lambda text, kind: float(traffic(text).get(kind, "0")[0].replace(",", "")) / c.layers
    words = ", ".join(f"{kind} " + " / ".join(f"{times(text, kind):.1f}" for text in texts.values())
                      for kind in KINDS)  # fmt: skip
    return [
        f"- From {few} to {many} chips parameters and optimiser fall from {held[few]:.2f} to {held[many]:.2f} GiB a "
        f"chip ({held[few] / held[many]:.1f} times less), the peak from {peak(texts[few]):.2f} to "
        f"{peak(texts[many]):.2f}. On {few} chips: {texts[few].splitlines()[-1]}.",
        f"- No whole model is gathered: the largest all-gather brings a chip {largest:.2f} GB, the embedding in "
        f"bfloat16; the model has {model:.1f} GB.",
        f"- Times a layer, at {' / '.join(map(str, texts))} chips: {words}. A layer has seven matrices: each is "
        "gathered for the forward pass and again for the backward pass (XLA joins some), and its gradient summed "
        "once: by a reduce-scatter, by an all-reduce where fsdp is the whole of a square slice (the compiler's choice, "
        "twice the traffic), or, on few chips, by permutations in a ring that overlap with the matmuls, as are then "
        "the gathers. The unembedding's gradient is summed anew for each part of the loss.",
    ]


def references_table(results: dict[str, str]) -> list[str]:
    """Peaks beside those of another decoder."""
    rows = [["plan", "flags of `train_sft`", "theirs, GiB a chip", "ours", "ours / theirs"]]
    for name, (theirs, argv) in REFERENCES.items():
        if text := results.get(name):
            rows.append(
                [
                    f"`{name}`",
                    f"`{argv}`",
                    f"{theirs}",
                    f"{peak(text):.1f}",
                    f"{peak(text) / theirs:.2f}",
                ]
            )
    return table(rows)


def section(results: dict[str, str]) -> str:
    """The part of the page that this file writes."""
    commands = [f"{name:11} python plan.py {CASES[name]}" for name in MODELS if name in results]
    lines = [
        BEGIN, "## Plans of real models, compiled without a pod", "",
        "By the chips' compilers on two shared CPU cores (`python -m benchmarks.pods all`); nothing has run on a TPU. "
        "What a step takes at least is a roofline of compute, memory and a chip's links together, each fully "
        "overlapped: a bound, no forecast. CPU-s are the processor's.", "",
        *models_table(results), "", "```", *commands, "```", "",
    ]  # fmt: skip
    if results.keys() & SCALING.keys():
        lines += [f"`{SCALING['scale-256']}` and the same on fewer chips, `--mesh.fsdp` their number:", "",
                  *scaling_table(results), "", *scaling_remarks(results), ""]  # fmt: skip
    if results.keys() & REFERENCES.keys():
        lines += ["Peaks beside those of another decoder in plain JAX, compiled in the same way:", "",
                  *references_table(results), "",
                  "Where tensor is above 1 ours is lower because the residual stream is split over tensor between "
                  "layers, which theirs keeps whole on each device. Without remat ours is lower because norms and "
                  "gates are computed again even so: without the two `jax.checkpoint` of model.py the last line's peak "
                  "comes within 3 % of theirs.",
                  ""]  # fmt: skip
    lines += ["The rollout of `train_ppo` and `train_grpo` is another matter: it gathers the weights over fsdp in "
              "bfloat16, once for all tokens that it decodes, and keeps them cut over tensor alone.", ""]  # fmt: skip
    for name in ("ppo-8b", "long-8b", "sweep"):
        if name in results:
            lines += [
                f"The whole of `{name}`, `python plan.py {CASES[name]}`:",
                "",
                "```",
                results[name],
                "```",
                "",
            ]
    return "\n".join([*lines, END])


def printed(argv: list[str]) -> str:
    """What plan.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.main(argv)
    return out.getvalue().rstrip()


def main(names: list[str]) -> None:
    """Measures the cases named, then writes the page."""
    if unknown := [name for name in names if name not in CASES and name != "all"]:
        raise UserError(f"{unknown[0]}: unknown; choose of {', '.join(CASES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in CASES if "all" in names else names:
        start = time.monotonic()
        results[name] = printed(CASES[name].split())
        print(
            f"{name}: {time.monotonic() - start:.0f} s in all; {results[name].splitlines()[-1]}",
            flush=True,
        )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text() if PAGE.exists() else "# Pods\n\n" + BEGIN + END + "\n"
    if BEGIN not in page:
        page = page.rstrip() + "\n\n" + BEGIN + END + "\n"
    before, rest = page.split(BEGIN, 1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(before + section(results) + rest.split(END, 1)[1])


if __name__ == "__main__":
    flags.ending_in_one_line(lambda: main(sys.argv[1:]))
