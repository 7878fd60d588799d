"""Compile a script's programs for chips that are not here, and write the tables of plan.py."""

import dataclasses
import importlib
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from planning import hlo
from planning.chips import CHIPS, GIB, Chip, devices_of
from planning.programs import SCRIPTS, Plan, Program
from runtime import flags
from runtime.errors import UserError
from sharding import make_mesh


@dataclasses.dataclass
class Result:
    """A program compiled: bytes and FLOPs a chip and call."""

    program: Program
    arguments: float
    temporaries: float
    """With outputs that take no argument's place."""
    held: float
    """Of the plan's other trees, which lie in memory too."""
    cost: hlo.Cost | None
    """None where the compiler refused: the program alone is too large."""
    seconds: float
    """Of compiling, the processor's."""

    @property
    def peak(self) -> float:
        return self.arguments + self.temporaries + self.held

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each resource needs for a call, if it were the only one."""
        moved = sum(received for _, received, _ in self.cost.moved.values())
        return {
            "compute": self.cost.flops / chip.flops,
            "memory": self.cost.memory / chip.bandwidth,
            "links": moved / chip.links,
        }

    def roofline(self, chip: Chip) -> float:
        """Least seconds of a call, if all three overlap fully."""
        return max(self.bounds(chip).values())


def bytes_of(tree: Any) -> float:
    """Of a tree of shapes with shardings, on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding is not None]
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    )


def compiled(program: Program, plan: Plan, mesh: jax.sharding.Mesh) -> Result:
    """Compile a program; one that its compiler refuses for its size has the size that it names, and no cost."""
    held = sum(bytes_of(tree) for name, tree in plan.held.items() if name not in program.held)
    start = time.process_time()
    try:
        executable = program.function.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as fault:
        sizes = re.findall(r"([\d.]+)([KMGT])\b", str(fault))
        if "RESOURCE_EXHAUSTED" not in str(fault) or not sizes:
            raise
        needed = float(sizes[0][0]) * 1024 ** (1 + "KMGT".index(sizes[0][1]))
        arguments = bytes_of(program.args)
        return Result(program, arguments, needed, held, None, time.process_time() - start)
    memory, cost = executable.memory_analysis(), hlo.cost(executable.as_text(), dict(mesh.shape))
    arguments, new_outputs = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )
    temporaries = memory.temp_size_in_bytes + new_outputs
    if (
        mesh.devices.flat[0].platform == "tpu"
    ):  # whose compiler goes by the peak, and takes more temporaries than fit
        temporaries = memory.peak_memory_in_bytes - arguments
    return Result(program, arguments, temporaries, held, cost, time.process_time() - start)


def compiled_all(plan: Plan, mesh: jax.sharding.Mesh, chip: Chip) -> list[Result]:
    """The programs; none is compiled where what is held all the time is more than the memory."""
    if sum(map(bytes_of, plan.held.values())) < chip.memory:
        return [compiled(program, plan, mesh) for program in plan.programs]
    held = [
        sum(bytes_of(t) for name, t in plan.held.items() if name not in p.held)
        for p in plan.programs
    ]
    return [
        Result(p, bytes_of(p.args), 0.0, h, None, 0.0)
        for p, h in zip(plan.programs, held, strict=True)
    ]


def table(rows: list[list[Any]]) -> str:
    """Rows as aligned text, the first column to the left; numbers with three figures."""
    text = [[f"{x:,.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:,.0f}" if isinstance(x, float) else str(x)
             for x in row] for row in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = (
        [
            f"{x:<{w}}" if i == 0 else f"{x:>{w}}"
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in text
    )
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines)


def memory_tables(plan: Plan, results: list[Result], chip: Chip) -> Iterator[str]:
    """What lies in memory, and the peak of each program."""
    yield "held all the time, GiB a chip"
    yield table([[name, bytes_of(tree) / GIB] for name, tree in plan.held.items()])
    rows = [
        [
            "programs, GiB a chip",
            "arguments",
            "gradients",
            "KV cache",
            "temporaries",
            "others held",
            "peak",
        ]
    ]
    for r in results:
        gradients, cache = bytes_of(r.program.gradients), bytes_of(r.program.cache)
        rest = max(r.temporaries - gradients - cache, 0.0)
        parts = (r.arguments, gradients, cache, rest, r.held, r.peak)
        rows.append([r.program.name, *(x / GIB for x in parts)])
    yield table(rows)
    for r in results:
        ours = sum(bytes_of(plan.held[name]) for name in r.program.held)
        theirs = r.arguments - bytes_of(r.program.args) + ours
        if r.program.gradients is not None and r.cost is not None:
            yield (f"  {r.program.name}: parameters and optimiser {ours / GIB:.4f} GiB by the sharding rules, "
                   f"{theirs / GIB:.4f} by the compiler ({theirs / ours - 1:+.2%})")  # fmt: skip


def speed_tables(results: list[Result], chip: Chip, chips: int) -> Iterator[str]:
    """FLOPs, traffic and the roofline."""
    rows = [["programs, a step", "calls", "TFLOPs a chip", "model TFLOPs", "memory GB", "links GB",
             "compute s", "memory s", "links s", "roofline s", "to compile CPU-s"]]  # fmt: skip
    for r in results:
        n, bounds = r.program.calls, r.bounds(chip)
        moved = sum(received for _, received, _ in r.cost.moved.values())
        rows.append([r.program.name, n, n * r.cost.flops / 1e12, n * r.program.model_flops / chips / 1e12,
                     n * r.cost.memory / 1e9, n * moved / 1e9, *(n * x for x in bounds.values()),
                     n * r.roofline(chip), r.seconds])  # fmt: skip
    yield table(rows)
    rows = [["collectives, a chip and step", "over", "times", "GB received", "MB by the largest"]]
    for r in results:
        for (kind, axes), (times, received, largest) in sorted(
            r.cost.moved.items(), key=lambda x: -x[1][1]
        ):
            n = r.program.calls
            rows.append(
                [
                    f"{r.program.name}: {kind}",
                    axes,
                    f"{n * times:,.0f}",
                    n * received / 1e9,
                    largest / 1e6,
                ]
            )
    yield table(rows)


def remedy(config: Any, plan: Plan, worst: Result, chip: Chip) -> str:
    """The field to change where the run does not fit."""
    always, mesh = sum(map(bytes_of, plan.held.values())), jax.sharding.get_mesh().shape
    if always > 0.9 * chip.memory:
        if mesh["data"] > 1:
            return "raise --mesh.fsdp and lower --mesh.data: what is held all the time is copied over data"
        return "name a larger --topology, or train adapters (--lora.rank=8)"
    if worst.program.gradients is not None:
        if config.model.remat != "full":
            return "--model.remat=full"
        parts = config.microbatches * 2
        if worst.program.rows % (parts * mesh["data"] * mesh["fsdp"]):
            return f"raise --mesh.tensor (now {mesh['tensor']}) and lower --mesh.fsdp: a micro-batch is one row"
        return f"--microbatches={parts}"
    advice = f"lower --batch_size (now {config.batch_size}): {worst.program.name} takes all of it at once"
    if worst.program.cache is not None:
        advice += "; or raise --mesh.tensor and lower --mesh.fsdp, over which decoding holds the weights whole"
    return advice


class Verdict(NamedTuple):
    """A configuration, compiled."""

    fits: bool
    peak: float
    seconds: float
    """Roofline of a step; infinite where a program is too large to compile."""
    text: str
    results: list[Result]


def judged(name: str, script: Any, config: Any, topology: str, devices: list[Any]) -> Verdict:
    """Compile everything and write the tables."""
    mesh, chip = make_mesh(config.mesh, devices), CHIPS[topology.partition(":")[0]]
    plan, chips = SCRIPTS[name](script, config, mesh), len(devices)
    results = compiled_all(plan, mesh, chip)
    worst = max(results, key=lambda r: r.peak)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [f"{name}, {config.model.preset} on {topology}: {chips} chips as {shape}; "
             f"{config.batch_size / chips:.3g} of {config.batch_size} sequences a chip; "
             f"compiled in {sum(r.seconds for r in results):.0f} CPU-s",
             *memory_tables(plan, results, chip)]  # fmt: skip
    seconds = math.inf
    if all(r.cost is not None for r in results):
        seconds = sum(r.program.calls * r.roofline(chip) for r in results)
        lines += speed_tables(results, chip, chips)
        model, done = (sum(r.program.calls * f(r) for r in results) for f in
                       (lambda r: r.program.model_flops / chips, lambda r: r.cost.flops))  # fmt: skip
        lines.append(f"a step: {seconds:.3g} s at least, {plan.tokens / seconds:,.0f} tokens/s, MFU at most "
                     f"{model / chip.flops / seconds:.3f}; {model / 1e12:.4g} model TFLOPs and "
                     f"{done / 1e12:.4g} by the compiler, a chip")  # fmt: skip
    fits = worst.peak <= chip.memory and seconds < math.inf
    sizes = f"{worst.program.name} peaks at {worst.peak / GIB:.2f} of {chip.memory / GIB:.2f} GiB"
    lines.append(
        f"fits: {sizes}" if fits else f"does not fit: {sizes}; {remedy(config, plan, worst, chip)}"
    )
    return Verdict(fits, worst.peak, seconds, "\n".join(lines), results)


def shapes_to_try(config: Any, chips: int) -> Iterator[Any]:
    """Meshes worth trying: the model cut over fsdp, or over fsdp and tensor, or over parts with copies of it."""
    chips //= max(config.mesh.sequence, 1) * max(
        config.mesh.stage, 1
    )  # which are as they were asked for
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4, 8):
            if chips % (tensor * data) == 0 and config.model.heads % tensor == 0:
                yield dataclasses.replace(
                    config.mesh, data=data, fsdp=chips // tensor // data, tensor=tensor
                )


def sweep(
    name: str, script: Any, config: Any, topology: str, devices: list[Any]
) -> Verdict | None:
    """Try meshes, each with the fewest micro-batches that fit; prints those that fit, the fastest first."""
    found = []
    for mesh in shapes_to_try(config, len(devices)):
        for parts in (1, 2, 4, 8, 16):
            tried = dataclasses.replace(config, mesh=mesh, microbatches=parts)
            try:
                verdict = judged(name, script, tried, topology, devices)
            except UserError:
                break  # the batch does not split so
            words = f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, {parts} micro-batches"
            print(f"  {words}: {verdict.text.splitlines()[-1]}", flush=True)
            if verdict.fits:
                found.append((verdict.seconds, verdict.peak, words, verdict))
                break
            if "--microbatches" not in verdict.text.splitlines()[-1]:
                break
    found.sort(key=lambda x: x[:2])
    rows = [
        ["those that fit", "roofline s", "peak GiB"],
        *([words, s, peak / GIB] for s, peak, words, _ in found),
    ]
    print(table(rows))
    return found[0][-1] if found else None


def split_flags(argv: list[str]) -> tuple[str, str, bool, list[str]]:
    """(script, topology, whether to sweep, the script's flags); raises UserError."""
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name a script first: python plan.py train_sft --topology=v5e:16x16 ... (see plan.py's top)"
        )
    argv = [
        part
        for word in argv
        for part in (word.split("=", 1) if word.startswith("--topology=") else [word])
    ]
    if "--topology" not in argv[:-1]:
        raise UserError("--topology: missing; as in --topology=v5e:16x16")
    at = argv.index("--topology")
    rest = argv[1:at] + argv[at + 2 :]
    name = argv[0].removesuffix(".py")
    return name, argv[at + 1], "--sweep" in rest, [word for word in rest if word != "--sweep"]


def main(argv: list[str]) -> Verdict | None:
    """Prints the tables, the verdict last; returns it (of a sweep the best, None where nothing fits)."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that happens to be here is not asked
    name, topology, sweeping, rest = split_flags(argv)
    if name not in SCRIPTS:
        raise UserError(
            f"{name}: plan.py knows {', '.join(SCRIPTS)}; describe it in planning/programs.py"
        )
    script = importlib.import_module(name)
    config = flags.parse(script.Config, rest)
    devices = devices_of(topology)
    if devices[0].platform == "cpu":
        print("note: the CPU's compiler stands in for CUDA's (pip install -r requirements-gpu.txt): the same FLOPs and "
              "collectives, but temporaries are too large, for it holds some bfloat16 arrays in float32")  # fmt: skip
        if config.model.dtype == "auto":
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, dtype="bfloat16")
            )
    verdict = (sweep if sweeping else judged)(name, script, config, topology, devices)
    print(
        verdict.text
        if verdict
        else "does not fit: no mesh that was tried; name a larger --topology",
        flush=True,
    )
    return verdict
