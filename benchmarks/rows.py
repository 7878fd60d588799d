"""Rows of a benchmark: sides in turns, each in a process of its own, within a time limit.

A side is what is compared with the others: Plumb first, then each peer. All sides of a row are
made at the same time; then each is timed once a round, so that other work on the machine slows
all alike. A side that fails, or is not ready in time, is left out and the row says so; a row that
reaches its limit keeps the rounds that it has. The results are written after every row, so that a
benchmark that is killed leaves all rows before.

On a machine whose cores others use too, turns are not enough: threads that wait for one another
are slowed many times over, some libraries' more than others'. `--cores 1` holds each side to one
core and counts the seconds of its own work, in which waiting has no part.

In one process with PyTorch a PPO iteration of ours took 13 % longer than alone: threads and
memory are shared.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from runtime.errors import UserError

# The sides of a row share an accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Call = Callable[[], float | None]
"""A piece of work. It returns when that is done: how many tokens, None for those of the row."""

START_S = 20.0
"""Seconds within which a process must have found the device: the first thing that is done."""
READY = 0.75
"""Share of a row's limit in which a side must be compiled and have run once."""
RESULTS = str(pathlib.Path(__file__).parent / "results")


# ---- What a row is ----


class Built(NamedTuple):
    """A side, made in its own process."""

    calls: dict[str, Call]
    """Calls to time, by name: the row's own work first, then parts of it."""
    library: str
    """jax, torch or ctranslate2: its version, threads and matmul rate are recorded."""
    packages: tuple[str, ...] = ()
    """Other packages whose versions are recorded."""
    check: Any = None
    """The result that `Row.agree` compares between the sides."""
    repeats: int = 1
    """Times that one call does its work."""
    facts: dict[str, Any] | None = None
    """Further values recorded with the side, by name."""


class Side(NamedTuple):
    """How to make a side: `build(*args)`, both of which are pickled, returns a Built."""

    build: Callable[..., Built]
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the results: the same work by several sides."""

    what: str
    sides: dict[str, Side]
    """By name; the first is the one that is compared with the others."""
    tokens: dict[str, float]
    """Tokens of each call, by its name; those that a call returns come first."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further values recorded with the row, by name."""
    agree: Callable[[dict[str, Any]], None] | None = None
    """agree({side: its check}) raises AssertionError where the sides do not do the same."""
    limit: float = 300.0
    """Most seconds that it takes, those of starting and compiling included."""


def within(rows: Sequence[Row], limits: Sequence[float]) -> list[Row]:
    """Return `rows` with these limits in order, the last of them for all that are left."""
    limited = []
    for number, row in enumerate(rows):
        limit = limits[min(number, len(limits) - 1)]
        limited.append(dataclasses.replace(row, limit=limit))
    return limited


# ---- A side, in its process ----


Clock = Callable[[], float]
"""Seconds so far: time.perf_counter, or time.process_time, those of this process's own work."""


def seconds_of(call: Call, at_least: float, clock: Clock) -> tuple[float, float | None]:
    """Return the seconds of one call, averaged over as many as fill `at_least`, and its tokens."""
    # After a pause caches are cold, and pages went back to the system.
    call()
    calls = 0
    start = clock()
    while calls == 0 or clock() - start < at_least:
        tokens = call()
        calls += 1
    return (clock() - start) / calls, tokens


def matmul_gflops(library: str, clock: Clock, at_least: float = 0.1) -> float | None:
    """Return the GFLOP/s of a library's product of two matrices; None for one that has none.

    The factors are those of a feed-forward layer of the small model on a CPU, in float32, and
    square ones of 8,192 in bfloat16 on an accelerator.
    """
    if library not in ("jax", "torch"):
        return None
    call, flops = _jax_matmul() if library == "jax" else _torch_matmul()
    seconds, _ = seconds_of(call, at_least, clock)
    return flops / seconds / 1e9


CPU_MATMUL = (2048, 256, 1376)
ACCELERATOR_MATMUL = (8192, 8192, 8192)


@functools.cache
def _jax_matmul() -> tuple[Call, float]:
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    m, k, n = CPU_MATMUL if on_cpu else ACCELERATOR_MATMUL
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    a = jnp.ones((m, k), dtype)
    b = jnp.ones((k, n), dtype)
    product = jax.jit(jnp.dot)

    def call() -> None:
        product(a, b).block_until_ready()

    return call, 2.0 * m * k * n


@functools.cache
def _torch_matmul() -> tuple[Call, float]:
    import torch

    on_gpu = torch.cuda.is_available()
    m, k, n = ACCELERATOR_MATMUL if on_gpu else CPU_MATMUL
    kind = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {}
    a = torch.ones((m, k), **kind)
    b = torch.ones((k, n), **kind)

    def call() -> None:
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize()

    return call, 2.0 * m * k * n


def threads_of(library: str) -> int:
    """Return how many threads of the CPU a library works with."""
    if library == "torch":
        import torch

        return torch.get_num_threads()
    # XLA has a thread for each core that the process may use; CTranslate2 is told so.
    return len(os.sched_getaffinity(0))


def _serve(pipe: Any, cores: int, build: Callable[..., Built], args: tuple[Any, ...]) -> None:
    """Build a side and answer what the benchmark asks, until it closes the pipe."""
    clock: Clock = time.perf_counter
    if cores:
        # Before the libraries count the cores that they may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        clock = time.process_time
    try:
        # Made, compiled and run once; then the benchmark hears what it is.
        built = build(*args)
        for call in built.calls.values():
            call()
        pipe.send(("done", (about(built), built.check)))

        # Timed as often as it is asked.
        while True:
            what, at_least = pipe.recv()
            if what == "matmul":
                pipe.send(("done", matmul_gflops(built.library, clock)))
                continue
            # The other processes' threads may still be spinning.
            time.sleep(0.3)
            timed = {}
            for name, call in built.calls.items():
                seconds, tokens = seconds_of(call, at_least, clock)
                timed[name] = (seconds / built.repeats, tokens)
            pipe.send(("done", timed))
    # The benchmark has ended.
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    # Told in the row.
    except BaseException as fault:
        pipe.send(("failed", in_one_line(fault)))


def about(built: Built) -> dict[str, Any]:
    """Return what is recorded of a side: its library, versions, threads, and its own facts."""
    versions = {}
    for package in (built.library, *built.packages):
        versions[package] = importlib.metadata.version(package)
    return {
        "library": built.library,
        "versions": versions,
        "threads": threads_of(built.library),
        **(built.facts or {}),
    }


def in_one_line(fault: BaseException) -> str:
    """Return the kind and the first words of an error."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text}"[:200]


class Late(Exception):
    """A side did not answer in time."""


class Failed(Exception):
    """A side raised an error, which this names, or its process died."""


class Process:
    """The process of a side, seen from the benchmark."""

    def __init__(self, side: Side, cores: int = 0):
        """Start it, on so many cores (0: all); it builds the side at once."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cores, *side), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, at_least: float, until: float) -> Any:
        """Return the answer; raise Late at the time `until` (time.monotonic), or Failed."""
        try:
            self._pipe.send((what, at_least))
        except BrokenPipeError:
            raise Failed("its process died") from None
        return self.answer(until)

    def answer(self, until: float) -> Any:
        """Return what comes next; as `ask`."""
        if not self._pipe.poll(max(0.0, until - time.monotonic())):
            raise Late
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"its process died (exit code {self._process.exitcode})") from None
        if kind == "failed":
            raise Failed(content)
        return content

    def end(self) -> None:
        """Let it end by itself, in a second; else kill it, whatever it does."""
        self._pipe.close()
        self._process.join(1.0)
        self._process.kill()
        self._process.join()


# ---- A row ----


def measure(row: Row, rounds: int, at_least: float, cores: int = 0) -> dict[str, Any]:
    """Make the sides of a row, time each once a round, and return what is written of it.

    `at_least`: seconds that a timing fills with calls. `cores`: those that each side is held to,
    whose own seconds are then counted; 0: all, and the seconds that pass.
    """
    # Late sides are left out, so that the others have the rest of the time.
    start = time.monotonic()
    until = start + row.limit
    result: dict[str, Any] = {
        "what": row.what,
        "asked": list(row.sides),
        "limit_s": row.limit,
        **row.facts,
        "sides": {},
        "left_out": {},
    }
    processes = {name: Process(side, cores) for name, side in row.sides.items()}
    try:
        checks = _ready(processes, result, start + READY * row.limit)
        try:
            # One side, or none that was ready in time, has nobody to agree with.
            if row.agree and len(checks) > 1:
                row.agree(checks)
        except AssertionError as fault:
            # Then the first is timed alone: nobody does the same.
            result["left_out"]["agreement"] = in_one_line(fault)
            for name in list(processes)[1:]:
                processes.pop(name).end()
        _time(processes, result, rounds, at_least, until)
        _summarise(row, result)
    finally:
        for process in processes.values():
            process.end()
    result["spent_s"] = round(time.monotonic() - start, 1)
    return result


def _ready(processes: dict[str, Process], result: dict[str, Any], until: float) -> dict[str, Any]:
    """Wait for the sides; return the checks of those that are ready, end the others."""
    checks = {}
    for name in list(processes):
        try:
            result["sides"][name], checks[name] = processes[name].answer(until)
            continue
        except Late:
            result["left_out"][name] = f"not ready after {READY:.0%} of {result['limit_s']:g} s"
        except Failed as fault:
            result["left_out"][name] = str(fault)
        processes.pop(name).end()
    return checks


def _time(
    processes: dict[str, Process],
    result: dict[str, Any],
    rounds: int,
    at_least: float,
    until: float,
) -> None:
    """Time every side once a round, in an order that is reversed in odd rounds."""
    sides = result["sides"]
    for side in sides.values():
        side.update({"seconds": {}, "tokens": {}, "matmul_gflops": []})
    for turn in range(rounds):
        names = list(processes)
        if turn % 2:
            names.reverse()
        this_round = {}
        for name in names:
            try:
                timed = processes[name].ask("time", at_least, until)
                matmul = processes[name].ask("matmul", 0, until)
                this_round[name] = timed, matmul
            except Late:
                # A round counts where all sides were timed in it.
                result["over_limit"] = f"{name} in round {turn + 1} of {rounds}"
                return
            except Failed as fault:
                result["left_out"][name] = str(fault)
                processes.pop(name).end()
        # All sides were timed: the round counts.
        for name, (timed, matmul) in this_round.items():
            for call, (seconds, tokens) in timed.items():
                sides[name]["seconds"].setdefault(call, []).append(seconds)
                sides[name]["tokens"].setdefault(call, []).append(tokens)
            sides[name]["matmul_gflops"].append(matmul)


def _lines(row: Row, sides: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each call of the first side that was timed ms, tokens/s and ratios of speed.

    A ratio is of tokens per second, in the same round; of them the median, the least and the
    greatest are kept. No lines where no side was timed.
    """
    timed = [name for name in row.sides if sides.get(name, {}).get("seconds")]
    if not timed:
        return []
    ours, *peers = timed

    def rates(name: str, call: str) -> list[float]:
        """Return a side's tokens per second in each round."""
        pairs = zip(sides[name]["seconds"][call], sides[name]["tokens"][call], strict=True)
        return [(tokens or row.tokens[call]) / seconds for seconds, tokens in pairs]

    # Each call beside those of the other sides that have it.
    lines = []
    for call, seconds in sides[ours]["seconds"].items():
        faster_than = {}
        for peer in peers:
            if call in sides[peer]["seconds"]:
                pairs = zip(rates(ours, call), rates(peer, call), strict=False)
                ratios = [mine / theirs for mine, theirs in pairs]
                faster_than[peer] = [statistics.median(ratios), min(ratios), max(ratios)]
        line = {
            "what": call,
            "side": ours,
            "ms": 1e3 * statistics.median(seconds),
            "tokens_per_s": statistics.median(rates(ours, call)),
            "faster_than": faster_than,
        }
        lines.append(line)
    return lines


def _summarise(row: Row, result: dict[str, Any]) -> None:
    """Add to a row its lines, of `_lines`, and by library its threads and median matmul rate."""
    sides = result["sides"]
    result["lines"] = _lines(row, sides)

    # By library: sides that share one share its threads, and their rates are taken together.
    gflops: dict[str, list[float]] = {}
    for side in sides.values():
        measured = side.pop("matmul_gflops")
        gflops.setdefault(side["library"], []).extend(x for x in measured if x)
    result["matmul_gflops"] = {
        library: statistics.median(every) for library, every in gflops.items() if every
    }
    result["threads"] = {side["library"]: side["threads"] for side in sides.values()}


# ---- The machine ----


def cpu_name() -> str:
    """Return the name of the processor, its family and model, as Linux tells them.

    Machines that are rented may have a name that fits several generations.
    """
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    # Processors are parted by blank lines; all are alike.
    first, _, _ = path.read_text().partition("\n\n")
    facts = {}
    for line in first.splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    name = facts.get("model name", platform.machine())
    numbers = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _device() -> Built:
    """Return a side whose check is the device that JAX finds."""
    import jax

    device = jax.devices()[0]
    facts = {
        "platform": device.platform,
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform_version": device.client.platform_version.splitlines()[0],
    }
    return Built({}, "jax", check=facts)


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge numbers: device, processor, cores, versions, load.

    Raises UserError where no device is found in START_S seconds.
    """
    process = Process(Side(_device, ()))
    try:
        _, device = process.answer(time.monotonic() + START_S)
    except Late:
        raise UserError(f"no device after {START_S:g} s; is another process using it?") from None
    except Failed as fault:
        raise UserError(f"JAX finds no device: {fault}") from None
    finally:
        process.end()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **device,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "python": sys.version.split()[0],
    }


# ---- All rows ----


def is_whole(row: dict[str, Any]) -> bool:
    """Return whether the first side of a measured row was timed, and all sides did the same."""
    lines = row["lines"] or [{}]
    return lines[0].get("side") == row["asked"][0] and "agreement" not in row["left_out"]


def seconds_in_all(rows: Sequence[Row]) -> float:
    """Return the most seconds that `run_rows` takes for `rows`, to find the device included."""
    return START_S + sum(row.limit for row in rows)


def run_rows(
    name: str,
    config: Any,
    rows: Sequence[Row],
    finish: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure `rows` one after another; print each, and write `<name>-<platform>.json` after each.

    `config` has `rounds`, `seconds`, `cores` (see `measure`) and `out`, the folder.
    `finish(result)` may add to all results so far before they are written.
    """
    # The machine before any row, and the settings.
    described = dataclasses.asdict(config)
    folder = pathlib.Path(described.pop("out"))
    result = {**machine(), "load_average": [os.getloadavg()[0]], "config": described, "rows": []}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{result['platform']}.json"

    print(f"{name}: {result['device']}, {result['cores']} cores"[:79])
    print(f"{'':32}{'ms':>10}{'tokens/s':>10}  times as fast as")
    for row in rows:
        result["rows"].append(measure(row, config.rounds, config.seconds, config.cores))
        result["load_average"].append(os.getloadavg()[0])
        if finish:
            finish(result)
        # At once whole: a kill while it is written leaves the file before.
        written = path.with_suffix(".part")
        written.write_text(json.dumps(result, indent=1) + "\n")
        written.replace(path)
        print_row(result["rows"][-1])
    return result


def shares(line: dict[str, Any]) -> list[str]:
    """Return a line's shares of the chip's peaks, as words; none on a CPU."""
    return [f"{name} {line[name]:.2f}" for name in ("mfu", "of_roofline") if name in line]


def print_row(row: dict[str, Any]) -> None:
    """Print a row: its lines, with the ratios and shares of each below one another."""
    for line in row["lines"]:
        words = [] if line["side"] == row["asked"][0] else [f"({line['side']})"]
        for peer, (median, least, greatest) in line["faster_than"].items():
            words.append(f"{peer} {median:.2f} ({least:.2f}-{greatest:.2f})")
        words += shares(line)
        # The first word stands behind the numbers, the others below it.
        start = f"{line['what']:32}{line['ms']:10.1f}{line['tokens_per_s']:10.0f}"
        for word in words or [""]:
            print(f"{start}  {word}".rstrip())
            start = " " * 52
    if not row["lines"]:
        print(row["what"])
    if "over_limit" in row:
        print(f"  over its limit of {row['limit_s']:g} s: {row['over_limit']}")
    for side, why in row["left_out"].items():
        print(f"  {side}: {why}"[:79])
    if row.get("matmul_gflops"):
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in row["matmul_gflops"].items())
        print(f"  matmul, GFLOP/s: {rates}")
    sys.stdout.flush()
