"""Compile a script's programs for chips that are not here, and write the tables of plan.py."""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import jax

from model_config import check_fit
from planning import hlo
from planning.chips import CHIPS, GIB, REACHED, Chip, devices_of
from planning.programs import Layout, Plan, Program, layout_of
from runtime import flags
from runtime.errors import UserError
from sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]


# --- compiling


@dataclasses.dataclass
class Result:
    """A program compiled: bytes and FLOPs of a call, on one chip."""

    program: Program
    arguments: float
    temporaries: float
    """Bytes of temporaries, and of outputs that take no argument's place."""
    held: float
    """Bytes of the plan's other trees, which lie in memory too."""
    cost: hlo.Cost | None
    """None where the compiler refused: the program alone is too large."""
    seconds: float
    """The processor's, of compiling."""

    @property
    def peak(self) -> float:
        """Bytes in memory at most."""
        return self.arguments + self.temporaries + self.held

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Return the seconds that each resource needs for a call, if it were the only one.

        Keys: compute, memory, links.
        """
        assert self.cost is not None
        return {
            "compute": self.cost.flops / chip.flops,
            "memory": self.cost.memory / chip.bandwidth,
            "links": received_bytes(self.cost) / chip.links,
        }

    def roofline(self, chip: Chip) -> float:
        """Return the least seconds of a call, if all three resources overlap fully."""
        return max(self.bounds(chip).values())

    def latency(self, chip: Chip) -> float:
        """Return the seconds of a call that its collectives take however little they send.

        As if none overlapped with anything: so it is while decoding, where each waits for the one
        before. It is not in the roofline, which goes by bytes.
        """
        assert self.cost is not None
        return sum(
            times * chip.latency.seconds(kind, chips)
            for (kind, chips), times in self.cost.groups.items()
        )


def received_bytes(cost: hlo.Cost) -> float:
    """Return the bytes that a chip receives in all collectives of a call."""
    return sum(received for _, received, _ in cost.moved.values())


def bytes_of(tree: Any) -> float:
    """Return the bytes on one device of a tree of shapes with shardings."""
    # A leaf without a sharding is a key, which is small.
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding is not None:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(total)


def held_bytes(plan: Plan) -> float:
    """Return the bytes on one device of what lies in memory all the time."""
    return sum(bytes_of(tree) for tree in plan.held.values())


def held_beside(program: Program, plan: Plan) -> float:
    """Return the bytes of the plan's trees that are not among the program's arguments."""
    # What the program is given counts among its arguments.
    total = 0.0
    for name, tree in plan.held.items():
        if name not in program.held:
            total += bytes_of(tree)
    return total


def compile_program(program: Program, plan: Plan, mesh: jax.sharding.Mesh) -> Result:
    """Compile a program for the devices of `mesh`, or of its own.

    One that its compiler refuses for its size has the size that the compiler names, and no cost.
    """
    # The processor's time: the machine may have other work.
    held = held_beside(program, plan)
    start = time.process_time()
    mesh = program.mesh or mesh
    try:
        with jax.set_mesh(mesh):
            executable = compiled(program.function.lower(*program.args))
    except jax.errors.JaxRuntimeError as fault:
        needed = _needed_bytes(str(fault))
        if needed is None:
            raise
        seconds = time.process_time() - start
        return Result(program, bytes_of(program.args), needed, held, None, seconds)
    # What the compiler says, and what its program does.
    memory = executable.memory_analysis()
    cost = hlo.cost(executable.as_text(), dict(mesh.shape))
    arguments = memory.argument_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu":
        # A TPU's compiler goes by the peak; its temporaries may be more than fit at a time.
        temporaries = memory.peak_memory_in_bytes - arguments
    else:
        # Outputs that take the place of donated arguments are no more memory.
        new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes + new_outputs
    return Result(program, arguments, temporaries, held, cost, time.process_time() - start)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a lowered program, on a GPU with cuBLAS's matmuls where XLA's own have no tiles."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as fault:
        # XLA tries its Triton matmuls out on the GPU; without one it takes the first, and for some
        # shapes there is none.
        if "find output tile sizes" not in str(fault):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _needed_bytes(fault: str) -> float | None:
    """Return the size that the compiler's fault names; None if it refused for another reason."""
    sizes = re.findall(r"([\d.]+)([KMGT])\b", fault)
    if "RESOURCE_EXHAUSTED" not in fault or not sizes:
        return None
    # The first size is the one that was asked for.
    number, unit = sizes[0]
    return float(number) * 1024 ** (1 + "KMGT".index(unit))


def compile_plan(plan: Plan, mesh: jax.sharding.Mesh, chip: Chip) -> list[Result]:
    """Compile the programs; none where what is held all the time is more than the memory."""
    # Compiling a large program takes minutes.
    if held_bytes(plan) < chip.memory:
        return [compile_program(program, plan, mesh) for program in plan.programs]
    # Arguments and what else is held are known without compiling.
    return [
        Result(program, bytes_of(program.args), 0.0, held_beside(program, plan), None, 0.0)
        for program in plan.programs
    ]


# --- tables


def table(rows: list[list[Any]]) -> str:
    """Return rows as aligned text, the first column to the left; floats with three figures."""
    # Numbers become text first: the widths follow.
    text = [[_cell(value) for value in row] for row in rows]
    # Each column as wide as its widest cell.
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = []
    for first, *others in text:
        # Words to the left, numbers to the right.
        cells = [first.ljust(widths[0])]
        for value, width in zip(others, widths[1:], strict=True):
            cells.append(value.rjust(width))
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def memory_tables(plan: Plan, results: list[Result], chip: Chip) -> Iterator[str]:
    """Yield what lies in memory all the time, and the peak of each program."""
    yield "held all the time, GiB a chip"
    held = [[name, bytes_of(tree) / GIB] for name, tree in plan.held.items()]
    yield table(held)

    parts = ("arguments", "gradients", "KV cache", "temporaries", "others held", "peak")
    # Gradients and the KV cache are parts of the compiler's temporaries.
    rows = [["programs, GiB a chip", *parts]]
    for result in results:
        gradients = bytes_of(result.program.gradients)
        cache = bytes_of(result.program.cache)
        # What remains is activations; rounding may make it negative.
        rest = max(result.temporaries - gradients - cache, 0.0)
        sizes = (result.arguments, gradients, cache, rest, result.held, result.peak)
        rows.append([result.program.name, *(size / GIB for size in sizes)])
    # Peaks of programs do not add up: they run one after another.
    yield table(rows)

    # Parameters and optimiser twice: by our sharding rules, and as the compiler lays them.
    for result in results:
        if result.program.gradients is None or result.cost is None:
            continue
        ours = sum(bytes_of(plan.held[name]) for name in result.program.held)
        theirs = result.arguments - bytes_of(result.program.args) + ours
        yield (
            f"  {result.program.name}: parameters and optimiser {ours / GIB:.4f} GiB by the "
            f"sharding rules, {theirs / GIB:.4f} by the compiler ({theirs / ours - 1:+.2%})"
        )


SPEED_COLUMNS = (
    "calls",
    "TFLOPs a chip",
    "model TFLOPs",
    "memory GB",
    "links GB",
    "compute s",
    "memory s",
    "links s",
    "roofline s",
    "latency s",
    "to compile CPU-s",
)


def speed_tables(results: list[Result], chip: Chip, chips: int) -> Iterator[str]:
    """Yield the FLOPs, the traffic and the roofline of each program, then the collectives."""
    rows: list[list[Any]] = [["programs, a step", *SPEED_COLUMNS]]
    for result in results:
        assert result.cost is not None
        calls = result.program.calls
        # Seconds of a step, of which a call is a part.
        bounds = [calls * seconds for seconds in result.bounds(chip).values()]
        rows.append(
            [
                result.program.name,
                calls,
                calls * result.cost.flops / 1e12,
                calls * result.program.model_flops / chips / 1e12,
                calls * result.cost.memory / 1e9,
                calls * received_bytes(result.cost) / 1e9,
                *bounds,
                calls * result.roofline(chip),
                calls * result.latency(chip),
                result.seconds,
            ]
        )
    yield table(rows)

    rows = [["collectives, a chip and step", "over", "times", "GB received", "MB by the largest"]]
    for result in results:
        assert result.cost is not None
        calls = result.program.calls
        # Those that send most come first.
        by_bytes = sorted(result.cost.moved.items(), key=lambda item: -item[1][1])
        for (kind, axes), (times, received, largest) in by_bytes:
            name = f"{result.program.name}: {kind}"
            count = f"{calls * times:,.0f}"
            rows.append([name, axes, count, calls * received / 1e9, largest / 1e6])
    yield table(rows)


def remedy(config: Any, plan: Plan, worst: Result, chip: Chip) -> str:
    """Name the field of the script's `config` to change where the run does not fit.

    `worst`: the program with the highest peak. The mesh is the one that is set.
    """
    # What is held all the time is cut by the mesh alone.
    mesh = jax.sharding.get_mesh().shape
    if held_bytes(plan) > 0.9 * chip.memory:
        if mesh["data"] > 1:
            return (
                "raise --mesh.fsdp and lower --mesh.data: what is held all the time is copied "
                "over data"
            )
        return "name a larger --topology, or train adapters (--lora.rank=8)"
    # An update: less is kept for the backward pass, then fewer rows are in memory at a time.
    if worst.program.gradients is not None:
        if config.model.remat != "full":
            return "--model.remat=full"
        parts = config.microbatches * 2
        if worst.program.rows % (parts * mesh["data"] * mesh["fsdp"]):
            return (
                f"raise --mesh.tensor (now {mesh['tensor']}) and lower --mesh.fsdp: a micro-batch "
                "is one row"
            )
        return f"--microbatches={parts}"
    # A pass over all rows at once.
    advice = (
        f"lower --batch_size (now {config.batch_size}): {worst.program.name} takes all of it at "
        "once"
    )
    if worst.program.cache is not None:
        advice += "; or raise --rollout.tensor, over which alone decoding cuts the weights"
    return advice


# --- a configuration


class Script(NamedTuple):
    """A script to plan."""

    name: str
    module: ModuleType
    layout: Layout
    is_fork: bool

    def lay_out(self, config: Any, mesh: jax.sharding.Mesh) -> Plan:
        """Return the plan of `config`; raise UserError for a fork that its layout does not fit."""
        try:
            return self.layout.plan(self.module, config, mesh)
        except (AttributeError, KeyError, TypeError) as fault:
            if not self.is_fork:
                raise
            reason = str(fault).partition("\n")[0]
            raise UserError(
                f"{self.name}: has the factories of {self.layout.example}, but is called or "
                f"configured otherwise ({reason}); describe it in planning/programs.py"
            ) from fault


class Verdict(NamedTuple):
    """A configuration, compiled."""

    fits: bool
    peak: float
    """Bytes on a chip, of the program with the highest peak."""
    seconds: float
    """Roofline of a step; infinite where a program is too large to compile."""
    text: str
    results: list[Result]


def compile_and_tabulate(
    script: Script, config: Any, topology: str, devices: list[Any]
) -> Verdict:
    """Compile all programs of `config` for `devices`, of `topology`, and write the tables."""
    mesh = make_mesh(config.mesh, devices)
    chip = CHIPS[topology.partition(":")[0]]
    plan = script.lay_out(config, mesh)
    chips = len(devices)
    results = compile_plan(plan, mesh, chip)
    worst = max(results, key=lambda result: result.peak)

    # The configuration, then the tables.
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    counted = f"{chips} chips"
    if chip.devices > 1:
        counted = f"{chips // chip.devices} chips of {chip.devices} devices, called chips here,"
    lines = [
        f"{script.name}, {config.model.preset} on {topology}: {counted} as {shape}; "
        f"{config.batch_size / chips:.3g} of {config.batch_size} sequences a chip; "
        f"compiled in {sum(result.seconds for result in results):.0f} CPU-s"
    ]
    lines += memory_tables(plan, results, chip)
    seconds = math.inf
    if all(result.cost is not None for result in results):
        lines += speed_tables(results, chip, chips)
        seconds = sum(result.program.calls * result.roofline(chip) for result in results)
        lines.append(speed_line(plan, results, chip, chips, seconds))
        lines += forecast_lines(results, chip, seconds)

    # The verdict is the last line.
    fits = worst.peak <= chip.memory and seconds < math.inf
    peak = worst.peak / GIB
    memory = chip.memory / GIB
    sizes = f"{worst.program.name} peaks at {peak:.2f} of {memory:.2f} GiB"
    if fits:
        lines.append(f"fits: {sizes}")
    else:
        advice = remedy(config, plan, worst, chip)
        lines.append(f"does not fit: {sizes}; {advice}")
    return Verdict(fits, worst.peak, seconds, "\n".join(lines), results)


def speed_line(plan: Plan, results: list[Result], chip: Chip, chips: int, seconds: float) -> str:
    """Return the line on a whole step of `seconds`: tokens a second, MFU, and FLOPs a chip."""
    # What the mathematics needs, and what the program does: more where it computes twice.
    model_flops = 0.0
    compiled_flops = 0.0
    for result in results:
        assert result.cost is not None
        model_flops += result.program.calls * (result.program.model_flops / chips)
        compiled_flops += result.program.calls * result.cost.flops
    return (
        f"a step: {seconds:.3g} s at least, {plan.tokens / seconds:,.0f} tokens/s, MFU at most "
        f"{model_flops / chip.flops / seconds:.3f}; {model_flops / 1e12:.4g} model TFLOPs and "
        f"{compiled_flops / 1e12:.4g} by the compiler, a chip"
    )


def forecast_lines(results: list[Result], chip: Chip, seconds: float) -> Iterator[str]:
    """Yield what latency adds to a step whose roofline is `seconds`, and what may be expected."""
    latency = sum(result.program.calls * result.latency(chip) for result in results)
    start, hop, _ = chip.latency
    yield (
        f"latency of collectives: {latency:.3g} s more where none overlaps, {start * 1e6:.3g} us "
        f"each and {hop * 1e6:.3g} us a hop: {seconds + latency:.3g} s"
    )
    low, high = REACHED
    yield (
        f"forecast: {seconds / high + latency:.3g} to {seconds / low + latency:.3g} s: published "
        f"runs reach {low:.2f} to {high:.2f} of such a bound (MaxText; planning/chips.py)"
    )


def meshes_to_try(config: Any, chips: int) -> Iterator[Any]:
    """Yield mesh configs worth trying on `chips` chips.

    The model cut over fsdp, over fsdp and tensor, or over parts with copies of it; sequence and
    stage are as they were asked for.
    """
    chips //= max(config.mesh.sequence, 1) * max(config.mesh.stage, 1)
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4, 8):
            if chips % (tensor * data) == 0 and config.model.heads % tensor == 0:
                fsdp = chips // tensor // data
                yield dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)


def sweep(script: Script, config: Any, topology: str, devices: list[Any]) -> Verdict | None:
    """Try meshes, each with the fewest micro-batches that fit, and print a line on each.

    Then prints those that fit, the fastest first, and returns that; None where nothing fits.
    """
    # More micro-batches take less memory and are no faster: the first that fit are taken.
    found = []
    for mesh in meshes_to_try(config, len(devices)):
        for parts in (1, 2, 4, 8, 16):
            tried = dataclasses.replace(config, mesh=mesh, microbatches=parts)
            try:
                verdict = compile_and_tabulate(script, tried, topology, devices)
            except UserError:
                # The batch does not split so.
                break
            words = (
                f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, "
                f"{parts} micro-batches"
            )
            last_line = verdict.text.splitlines()[-1]
            print(f"  {words}: {last_line}", flush=True)
            if verdict.fits:
                found.append((words, verdict))
                break
            if "--microbatches" not in last_line:
                break
    # The fastest; of equally fast ones that with more room.
    found.sort(key=lambda item: (item[1].seconds, item[1].peak))
    rows: list[list[Any]] = [["those that fit", "roofline s", "peak GiB"]]
    for words, verdict in found:
        rows.append([words, verdict.seconds, verdict.peak / GIB])
    print(table(rows))
    return found[0][1] if found else None


# --- the command

HELP = {"--help", "-h"}
FLAGS_HELP = f"""plan.py's own flags:
  --topology CHIP:SHAPE  Chips to plan for, as in v5e:16x16 or h200:8. Of
                         {", ".join(CHIPS)}.
  --sweep                Try meshes, each with the fewest micro-batches that fit, and plan the
                         fastest.
All other flags are the script's: plan.py SCRIPT --help lists them.
"""


class Command(NamedTuple):
    """A command line of plan.py."""

    script: str
    """A script's name, or a fork's path, without `.py`."""
    topology: str
    is_sweep: bool
    flags: list[str]
    """The script's own."""


def read_command(argv: list[str]) -> Command:
    """Tell plan.py's own arguments from the script's; raise UserError where one is missing."""
    # The script comes first; its flags are read by its own Config.
    if not argv or argv[0].startswith("-"):
        raise UserError(
            "name a script first: python plan.py train_sft --topology=v5e:16x16 ... "
            "(plan.py --help tells more)"
        )
    # `--topology=x` and `--topology x` are the same.
    words = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--topology=") else [word]
    if "--topology" not in words[:-1]:
        raise UserError("--topology: missing; as in --topology=v5e:16x16")
    at = words.index("--topology")
    rest = words[1:at] + words[at + 2 :]
    script_flags = [word for word in rest if word != "--sweep"]
    return Command(
        script=argv[0].removesuffix(".py"),
        topology=words[at + 1],
        is_sweep="--sweep" in rest,
        flags=script_flags,
    )


def show_help(name: str) -> NoReturn:
    """Print plan.py's own flags, then those of the script `name`, and end with exit code 0."""
    config_class = load_script(name.removesuffix(".py")).module.Config
    print(FLAGS_HELP, flush=True)
    flags.parse(config_class, ["--help"])
    raise SystemExit(0)


def load_script(name: str) -> Script:
    """Import a script of the root by its name, or a fork by its path, from here or the root.

    Raises UserError where there is none, or for one that plan.py cannot lay out. A fork's own
    model.py is taken if its folder is first on sys.path before `model` is imported, which plan.py
    sees to.
    """
    path = find_script(name)
    is_fork = path.parent != ROOT
    module = import_file(path) if is_fork else importlib.import_module(path.stem)
    return Script(name, module, layout_of(module), is_fork)


def find_script(name: str) -> pathlib.Path:
    """Return the file of the script `name`; raise UserError where there is none."""
    # A name is one of the root's; a path may be given from anywhere.
    folders = [pathlib.Path.cwd(), ROOT] if "/" in name else [ROOT]
    for folder in folders:
        path = (folder / f"{name}.py").resolve()
        if path.is_file():
            return path
    raise UserError(
        f"{name}: no such script; plan.py knows those of the root, such as train_sft, and forks "
        "by their path, such as experiments/mine/train_sft"
    )


def import_file(path: pathlib.Path) -> ModuleType:
    """Import the fork at `path` under a name of its own, its folder first on sys.path."""
    # Modules beside the fork come first, as when it is run.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    place = path.with_suffix("").as_posix()
    name = "fork_" + re.sub(r"\W", "_", place)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(argv: list[str]) -> Verdict | None:
    """Print the tables, the verdict last; return it.

    Of a sweep the best is returned, None where nothing fits. `--help` after a script ends the
    process with exit code 0. Raises UserError for mistakes.
    """
    # A TPU that happens to be here is not asked.
    jax.config.update("jax_platforms", "cpu")
    if not HELP.isdisjoint(argv) and not argv[0].startswith("-"):
        show_help(argv[0])
    command = read_command(argv)
    script = load_script(command.script)
    config = flags.parse(script.module.Config, command.flags)
    # As the run itself would refuse it: the model's context must hold the rows.
    if hasattr(config, "length"):
        length = config.length
    else:
        length = config.max_prompt + config.max_new_tokens
    check_fit(config.model, config.model.vocab, length)
    # After the flags: a mistake in them is told at once.
    devices = devices_of(command.topology)
    if devices[0].platform == "cpu":
        print(
            "note: the CPU's compiler stands in for CUDA's (pip install -r requirements-gpu.txt): "
            "the same FLOPs and collectives, but temporaries are too large, for it holds some "
            "bfloat16 arrays in float32"
        )
        if config.model.dtype == "auto":
            model = dataclasses.replace(config.model, dtype="bfloat16")
            config = dataclasses.replace(config, model=model)
    work = sweep if command.is_sweep else compile_and_tabulate
    # Of a sweep the tables are of the best alone.
    verdict = work(script, config, command.topology, devices)
    if verdict:
        print(verdict.text, flush=True)
    else:
        print("does not fit: no mesh that was tried; name a larger --topology", flush=True)
    return verdict
