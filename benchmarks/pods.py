"""The plans of docs/pods.md: real models compiled for pods that are not here, and their tables.

    python -m benchmarks.pods
    python -m benchmarks.pods sft-8b ppo-8b

The first writes the section of docs/pods.md from benchmarks/results/pods.json. The second compiles
the named plans before, half a minute to five minutes each; `all` is all of them. `rollouts` is the
table of --rollout.tensor and --int8 (benchmarks/results/rollouts.json).
"""

import contextlib
import io
import json
import pathlib
import re
import sys
import time
from typing import Any

import train_ppo
from model import LanguageModel, init_and_apply
from model_config import ModelConfig
from planning import plan
from planning.chips import CHIPS, GIB, devices_of
from planning.programs import Plan, abstract_params, rollout_programs
from runtime import flags
from runtime.errors import UserError
from sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
ROLLOUT_RESULTS = ROOT / "benchmarks" / "results" / "rollouts.json"
PAGE = ROOT / "docs" / "pods.md"
BEGIN = "<!-- written by benchmarks/pods.py: begin -->"
END = "<!-- end -->"

# ---- The plans: a script and its flags ----

MODEL_8B = "--model.preset=llama3-8b"
MODEL_70B = "--model.preset=llama3-70b"
ON_V5E = f"{MODEL_8B} --topology=v5e:16x16 --mesh.fsdp=64 --mesh.tensor=4"
ON_V5P = f"{MODEL_70B} --topology=v5p:8x8x8 --mesh.fsdp=128 --mesh.tensor=4"
ROLLOUT = "--batch_size=512 --max_prompt=512 --max_new_tokens=512 --minibatches=2"
LONG = (
    f"{MODEL_8B} --model.context=32768 --topology=v5e:16x16 --mesh.data=1 --mesh.fsdp=16 "
    "--mesh.sequence=16 --batch_size=16 --length=32768"
)
MODELS = {
    "sft-8b": f"train_sft {ON_V5E} --batch_size=512 --length=2048",
    "rm-8b": f"train_rm {ON_V5E} --batch_size=256 --length=2048",
    "dpo-8b": f"train_dpo {ON_V5E} --batch_size=256 --length=1024",
    "ppo-8b": f"train_ppo {ON_V5E} {ROLLOUT}",
    "grpo-8b": f"train_grpo {ON_V5E} {ROLLOUT}",
    "sft-70b": f"train_sft {ON_V5P} --batch_size=512 --length=4096",
    "rm-70b": f"train_rm {ON_V5P} --batch_size=256 --length=4096",
    "ppo-70b": f"train_ppo {ON_V5P} {ROLLOUT}",
    "long-8b": f"train_lm {LONG}",
    "sft-8b-v6e": f"train_sft {ON_V5E.replace('v5e', 'v6e')} --batch_size=512 --length=2048",
    "sft-1b-h200": (
        "train_sft --model.preset=llama3.2-1b --topology=h200:8 --mesh.fsdp=8 --batch_size=64 "
        "--length=2048"
    ),
}

# The same plan on more and more chips.
SHAPES = {16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SCALING = {
    f"scale-{chips}": (
        f"train_sft {MODEL_8B} --topology=v5e:{shape} --mesh.fsdp={chips} --batch_size=256 "
        "--length=1024"
    )
    for chips, shape in SHAPES.items()
}
# The best mesh of 256 chips that --sweep tries without tensor, on one square slice.
SCALING_BY_DATA = {
    "scale-256-data-2": SCALING["scale-256"].replace("fsdp=256", "fsdp=128") + " --mesh.data=2"
}
SWEEP = (
    "train_sft --model.preset=llama3.2-1b --topology=h200:8 --batch_size=64 --length=2048 --sweep"
)

# Peaks in GiB a chip of an earlier, separate decoder in plain JAX, compiled in this way. Only its
# models' sizes and these peaks are known: the shapes here are the published ones of those sizes.
LLAMA2_7B = (
    f"{MODEL_8B} --model.vocab=32000 --model.mlp_width=11008 --model.kv_heads=32 "
    "--model.context=4096"
)
ON_256 = "--topology=v5e:16x16 --mesh.fsdp=256 --length=2048"
ON_V5E_TENSOR = "--topology=v5e:16x16 --mesh.fsdp=64 --mesh.tensor=4"
ON_V5P_256 = f"{MODEL_70B} --topology=v5p:8x8x4"
ON_V5P_512 = f"{MODEL_70B} --topology=v5p:8x8x8"
ON_H200 = (
    "--model.preset=llama3.2-1b --model.tied=False --topology=h200:1 --batch_size=8 --length=2048"
)
REFERENCES = {
    "7b-256": (1.8, f"{LLAMA2_7B} {ON_256} --batch_size=256"),
    "7b-1024": (4.2, f"{LLAMA2_7B} {ON_256} --batch_size=1024"),
    "7b-2048": (7.7, f"{LLAMA2_7B} {ON_256} --batch_size=2048"),
    "7b-tensor": (10.4, f"{LLAMA2_7B} {ON_V5E_TENSOR} --batch_size=1024 --length=2048"),
    "70b-v5e": (10.2, f"{MODEL_70B} {ON_256} --batch_size=256"),
    "70b-256": (13.3, f"{ON_V5P_256} --mesh.fsdp=256 --batch_size=256 --length=4096"),
    "70b-256-tensor": (
        16.3,
        f"{ON_V5P_256} --mesh.fsdp=64 --mesh.tensor=4 --batch_size=128 --length=4096",
    ),
    "70b-512": (25.7, f"{ON_V5P} --batch_size=512 --length=4096"),
    "70b-512-tensor": (
        47.6,
        f"{ON_V5P_512} --mesh.fsdp=64 --mesh.tensor=8 --batch_size=512 --length=4096",
    ),
    "1.5b-full": (24.1, f"{ON_H200} --model.remat=full"),
    "1.5b-dots": (35.1, f"{ON_H200} --model.remat=dots"),
    "1.5b-none": (60.8, f"{ON_H200} --model.remat=none"),
}
CASES = (
    MODELS
    | SCALING
    | SCALING_BY_DATA
    | {"sweep": SWEEP}
    | {name: f"train_sft {argv}" for name, (_, argv) in REFERENCES.items()}
)


# ---- What plan.py printed, as tables ----

KINDS = ("all-gather", "collective-permute", "reduce-scatter", "all-reduce")


def table(rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def number(text: str) -> float:
    """Return a number that has commas at its thousands."""
    return float(text.replace(",", ""))


def peak(text: str) -> float:
    """Return the GiB a chip at the peak, from the last line of a plan."""
    return number(re.search(r"peaks at ([\d.,]+) of", text)[1])


def model_row(name: str, text: str) -> list[str]:
    """Return a plan's row of `models_table`."""
    first_line = re.search(r"^.*chips as .*$", text, re.MULTILINE)[0]
    mesh, seconds = re.search(r"chips as ([^;]*);.*compiled in (\d+ \S*s)", first_line).groups()
    verdict = text.splitlines()[-1]
    gaps = re.findall(r"by the compiler \(([+-][\d.]+%)\)", text)
    step = re.search(r"^a step: ([^;]*)", text, re.MULTILINE)
    return [f"`{name}`", mesh, verdict, ", ".join(gaps), seconds, step[1] if step else "-"]


def models_table(results: dict[str, str]) -> list[str]:
    """Return a table with a row for each plan of MODELS, from name -> what plan.py printed."""
    gap = "parameters and optimiser: compiler less rules"
    rows = [["plan", "mesh", "verdict", gap, "compiled in", "a step"]]
    for name in MODELS:
        if name in results:
            rows.append(model_row(name, results[name]))
    return table(rows)


def traffic(text: str) -> dict[str, tuple[str, str, str]]:
    """Return the update's traffic over fsdp: kind -> (times, GB received, MB by the largest)."""
    found = re.findall(r"update: (\S+) +fsdp +([\d,]+) +(\S+) +(\S+)", text)
    return {kind: (times, received, largest) for kind, times, received, largest in found}


def scaling_table(results: dict[str, str]) -> list[str]:
    """Return a table of peak and traffic against the number of chips."""
    heads = [f"{kind} over fsdp: times, GB a chip, MB by the largest" for kind in KINDS]
    rows = [["chips", "peak, GiB a chip", *heads]]
    for name in SCALING:
        if name not in results:
            continue
        row = [name.removeprefix("scale-"), f"{peak(results[name]):.2f}"]
        moved = traffic(results[name])
        for kind in KINDS:
            row.append(", ".join(moved[kind]) if kind in moved else "-")
        rows.append(row)
    return table(rows)


def held(text: str) -> float:
    """Return the GiB a chip of parameters and optimiser."""
    found = re.findall(r"^  (?:parameters|optimiser) +(\S+)$", text, re.MULTILINE)
    return sum(float(x) for x in found)


def times_a_layer(texts: list[str]) -> str:
    """Return how often each kind of traffic happens in a layer, one number a text."""
    layers = ModelConfig.from_preset("llama3-8b").layers
    words = []
    for kind in KINDS:
        numbers = []
        for text in texts:
            times, *_ = traffic(text).get(kind, "0")
            numbers.append(f"{number(times) / layers:.1f}")
        words.append(f"{kind} " + " / ".join(numbers))
    return ", ".join(words)


def scaling_remarks(results: dict[str, str]) -> list[str]:
    """Return what `scaling_table` shows, in sentences with its numbers."""
    texts = {}
    for name in SCALING:
        if name in results:
            texts[int(name.removeprefix("scale-"))] = results[name]
    few, many = min(texts), max(texts)
    held_few, held_many = held(texts[few]), held(texts[many])
    # Parameters and two moments are held in float32, 12 bytes; the model in bfloat16 has 2.
    model_gb = held_many * many * 2**30 / 6 / 1e9
    largest_gb = max(number(traffic(text)["all-gather"][2]) for text in texts.values()) / 1e3
    chips = " / ".join(map(str, texts))
    return [
        f"- From {few} to {many} chips parameters and optimiser fall from {held_few:.2f} to "
        f"{held_many:.2f} GiB a chip ({held_few / held_many:.1f} times less), the peak from "
        f"{peak(texts[few]):.2f} to {peak(texts[many]):.2f}. On {few} chips: "
        f"{texts[few].splitlines()[-1]}.",
        f"- No whole model is gathered: the largest all-gather brings a chip {largest_gb:.2f} GB, "
        f"the embedding in bfloat16; the model has {model_gb:.1f} GB.",
        f"- Times a layer, at {chips} chips: {times_a_layer(list(texts.values()))}. A layer has "
        "seven matrices: each is gathered for the forward pass and again for the backward pass "
        "(XLA joins some), and its gradient summed once: by a reduce-scatter, by an all-reduce "
        "where fsdp is the whole of a square slice (the compiler's choice, twice the traffic), "
        "or, on few chips, by permutations in a ring that overlap with the matmuls, as are then "
        "the gathers. The unembedding's gradient is summed anew for each part of the loss.",
    ]


def references_table(results: dict[str, str]) -> list[str]:
    """Return a table of peaks beside those of another decoder."""
    rows = [["plan", "flags of `train_sft`", "the other, GiB a chip", "Plumb", "Plumb / other"]]
    for name, (other, argv) in REFERENCES.items():
        if name in results:
            here = peak(results[name])
            ratio = f"{here / other:.2f}"
            rows.append([f"`{name}`", f"`{argv}`", f"{other}", f"{here:.1f}", ratio])
    return table(rows)


# ---- Rollouts whose weights are cut over more chips ----

ROLLOUTS_OF_8B = (
    "",
    "--rollout.tensor=8",
    "--rollout.tensor=16",
    "--int8",
    "--rollout.tensor=8 --int8",
    "--rollout.tensor=16 --int8",
)
"""Flags of the rollouts that are compared; the mesh's own tensor is 4."""


def rollout_cost(more: str) -> dict[str, float]:
    """Compile the rollout of `ppo-8b` with `more` flags; return what it costs a chip.

    What lays the weights over other chips is in it. Bytes, FLOPs, seconds of latency.
    """
    # As plan.py does, but the rollout alone.
    argv = [*CASES["ppo-8b"].split(), *more.split()]
    command = plan.read_command(argv)
    config = flags.parse(train_ppo.Config, command.flags)
    mesh = make_mesh(config.mesh, devices_of(command.topology))
    train_ppo.check(config, mesh)
    model = LanguageModel(config.model)
    _, apply = init_and_apply(model)
    policy = abstract_params(model, mesh)
    programs, _ = rollout_programs(config, mesh, apply, policy, ())

    # Programs run one after another: costs add up, peaks do not.
    chip = CHIPS["v5e"]
    total = {"flops": 0.0, "memory": 0.0, "received": 0.0, "latency": 0.0, "peak": 0.0}
    for program in programs:
        result = plan.compile_program(program, Plan({}, programs, 0), mesh)
        assert result.cost is not None
        total["flops"] += result.cost.flops
        total["memory"] += result.cost.memory
        total["received"] += plan.received_bytes(result.cost)
        total["latency"] += result.latency(chip)
        total["peak"] = max(total["peak"], result.peak)
    return total


def rollouts_table(rollouts: dict[str, Any], ppo: str) -> list[str]:
    """Return a table of rollouts by their flags.

    `rollouts`: what `rollout_cost` returned, by flags. `ppo`: what plan.py printed for `ppo-8b`,
    of which the other programs' rooflines are taken.
    """
    # What an iteration takes beside its rollout.
    step = number(re.search(r"^a step: (\S+) s", ppo, re.MULTILINE)[1])
    columns = re.search(r"programs, a step .*\n  rollout +(.*)", ppo)[1].split()
    others = step - number(columns[8])

    chip = CHIPS["v5e"]
    head = ["flags", "memory GB a chip", "peak GiB", "rollout by bytes, s"]
    head += ["latency of its collectives, s", "rollout, s", "iteration, s"]
    rows = [head]
    for more, whole in rollouts.items():
        seconds = max(
            whole["flops"] / chip.flops,
            whole["memory"] / chip.bandwidth,
            whole["received"] / chip.links,
        )
        rollout = seconds + whole["latency"]
        figures = [seconds, whole["latency"], rollout, others + rollout]
        name = f"`{more}`" if more else "none"
        memory, own_peak = whole["memory"] / 1e9, whole["peak"] / GIB
        rows.append([name, f"{memory:,.0f}", f"{own_peak:.2f}", *(f"{x:.2f}" for x in figures)])
    return table(rows)


def compile_rollouts() -> None:
    """Compile the rollouts of `rollouts_table` and write their costs."""
    rollouts: dict[str, Any] = {}
    for more in ROLLOUTS_OF_8B:
        start = time.process_time()
        rollouts[more] = rollout_cost(more)
        seconds = time.process_time() - start
        print(f"rollout, {more or 'no flags'}: {seconds:.0f} CPU-s", flush=True)
        ROLLOUT_RESULTS.write_text(json.dumps(rollouts, indent=1) + "\n")


# ---- The section of the page ----

INTRODUCTION = (
    "By the chips' compilers on two shared CPU cores (`python -m benchmarks.pods all`); nothing "
    "has run on a TPU. The least time of a step is a roofline of compute, memory and a chip's "
    "links together, each fully overlapped: a bound, not a forecast. CPU-s are seconds of the "
    "processor."
)
OTHER_DECODER = (
    "Peaks beside those of another decoder, written separately in plain JAX and compiled in the "
    "same way. Only its model sizes and peaks are known; Plumb's shapes are the published ones of "
    "these sizes (`REFERENCES` in `benchmarks/pods.py`):"
)
WHY_LOWER = (
    "Where tensor is above 1, Plumb's peak is lower because the residual stream is split over "
    "tensor between layers; the other decoder keeps it whole on each device. Without remat it is "
    "lower because norms and gates are recomputed even then: without the two `jax.checkpoint` of "
    "model.py the last line's peak comes within 3 % of the other's."
)
ROLLOUTS = (
    "The rollout of `train_ppo` and `train_grpo` is different: it gathers the weights over fsdp "
    "in bfloat16, once for all tokens that it decodes, and keeps them cut over tensor only, or "
    "over `--rollout.tensor` chips: neighbours along fsdp join tensor for that time. Each token "
    "reads all of a chip's part, which is most of what decoding takes; over more chips that part "
    "is smaller, but the collectives, two a layer, go through more chips. With `--int8` "
    "the layers take half of it. For `ppo-8b`, 512 rows of 512 + 512 tokens, where tensor is 4:"
)
ROLLOUT_REMARKS = (
    "All other programs of the iteration are those of the plan above, by bytes. Latency is that "
    "of the rollout only, by the table of planning/chips.py, none of it overlapped. At 16 chips "
    "there are fewer key/value heads, 8, than chips, and each is copied: the cache, of all heads, "
    "then takes twice as much of a chip."
)
SWEEP_REMARK = (
    "- `--sweep` tries data 2, 4 and 8 beside fsdp too, and puts the least bound first: data 2 x "
    "fsdp 128 (`scale-256-data-2`) has {after}; fsdp 256 has {before}. The layers' gradients are "
    "then reduce-scattered within a copy of the model."
)


def sweep_remark(results: dict[str, str]) -> str:
    """Return what data 2 gains on 256 chips, in a sentence with the plans' numbers."""
    told = {}
    for word, name in (("after", "scale-256-data-2"), ("before", "scale-256")):
        told[word] = re.search(r"^a step: ([^;]*)", results[name], re.MULTILINE)[1]
    return SWEEP_REMARK.format(**told)


def section(results: dict[str, str], rollouts: dict[str, Any]) -> str:
    """Return the part of the page that this file writes, from name -> what plan.py printed.

    `rollouts`: of `rollouts_table`; {} leaves the table out.
    """
    commands = []
    for name in MODELS:
        if name in results:
            commands.append(f"{name:11} python plan.py {CASES[name]}")
    lines = [BEGIN, "## Plans of real models, compiled without a pod", "", INTRODUCTION, ""]
    lines += [*models_table(results), "", "```", *commands, "```", ""]
    if results.keys() & SCALING.keys():
        same = f"`{SCALING['scale-256']}` and the same on fewer chips, `--mesh.fsdp` their number:"
        lines += [same, "", *scaling_table(results), "", *scaling_remarks(results), ""]
    if results.keys() & SCALING_BY_DATA.keys():
        lines[-1:] = [sweep_remark(results), ""]
    if results.keys() & REFERENCES.keys():
        lines += [OTHER_DECODER, "", *references_table(results), "", WHY_LOWER, ""]
    lines += [ROLLOUTS, ""]
    if rollouts:
        lines += [*rollouts_table(rollouts, results["ppo-8b"]), "", ROLLOUT_REMARKS, ""]
    for name in ("ppo-8b", "long-8b", "sweep"):
        if name in results:
            lines += [f"The whole of `{name}`, `python plan.py {CASES[name]}`:", ""]
            lines += ["```", results[name], "```", ""]
    return "\n".join([*lines, END])


def with_section(page: str, begin: str, section: str) -> str:
    """Return a page with `section` in place of the one that starts with the mark `begin`.

    Both sections end with the mark END.
    """
    before, rest = page.split(begin, 1)
    _, after = rest.split(END, 1)
    return before + section + after


def write_page(results: dict[str, str]) -> None:
    """Write the section into docs/pods.md, in place of the one that it has."""
    page = PAGE.read_text("utf-8") if PAGE.exists() else f"# Pods\n\n{BEGIN}{END}\n"
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}{END}\n"
    PAGE.parent.mkdir(exist_ok=True)
    rollouts = json.loads(ROLLOUT_RESULTS.read_text()) if ROLLOUT_RESULTS.exists() else {}
    PAGE.write_text(with_section(page, BEGIN, section(results, rollouts)), "utf-8")


def printed(argv: list[str]) -> str:
    """Return what plan.py prints for these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.main(argv)
    return out.getvalue().rstrip()


def main(names: list[str]) -> None:
    """Compile the plans named, then write the page; raise UserError for an unknown name."""
    for name in names:
        if name not in CASES and name not in ("all", "rollouts"):
            raise UserError(f"{name}: unknown; choose of rollouts, {', '.join(CASES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not {"all", "rollouts"}.isdisjoint(names):
        compile_rollouts()
    for name in CASES if "all" in names else [name for name in names if name in CASES]:
        start = time.monotonic()
        results[name] = printed(CASES[name].split())
        seconds = time.monotonic() - start
        verdict = results[name].splitlines()[-1]
        print(f"{name}: {seconds:.0f} s in all; {verdict}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    flags.ending_in_one_line(lambda: main(sys.argv[1:]))
