"""Read from a compiled program's HLO what it does on one chip: FLOPs, memory, collectives.

XLA's own cost analysis counts the body of a loop once; here every loop counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
}
"""Size of an element by its type's name."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "iota",
    "async-start",
    "async-update",
    "opt-barrier",
}
"""Instructions that move no bytes themselves."""
KERNELS = {"flash_forward": 2, "flash_dq": 3, "flash_dkv": 4}
"""Matmuls of [T, H] x [H, T] size per query head in our Pallas kernels (kernels/flash.py), half of
each by causality."""


class Op(NamedTuple):
    """An instruction."""

    name: str
    shape: str
    """Its type's text."""
    code: str
    operands: list[str]
    """Names of instructions of the same computation."""
    rest: str
    """The text after the operands; of a constant or a parameter, from its value or number on."""
    root: bool


Computation = dict[str, Op]
"""Instructions by name, in order."""
Module = dict[str, Computation]
"""Computations by name."""


class Array(NamedTuple):
    """One array of a type."""

    kind: str
    """The element's type."""
    dims: list[int]
    in_main_memory: bool


class Visit(NamedTuple):
    """An instruction as `walk` meets it."""

    op: Op
    computation: Computation
    computation_name: str
    times: float
    """How often it runs."""
    fused: bool
    """True inside a fusion."""


@dataclasses.dataclass
class Cost:
    """The cost of one run of a program on one chip."""

    flops: float = 0.0
    """FLOPs of matmuls and attention kernels."""
    memory: float = 0.0
    """Bytes read from and written to the chip's main memory."""
    moved: dict[tuple[str, str], tuple[float, float, float]] = dataclasses.field(
        default_factory=dict
    )
    """{(collective, mesh axes): (times run, bytes that a chip receives, those by the largest)}."""
    groups: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    """{(collective, chips of a group): times run}."""


# --- reading HLO


def parse(text: str) -> tuple[Module, str]:
    """Return the computations of a module's text, and the entry's name."""
    module: Module = {}
    entry = ""
    for line in text.splitlines():
        # A line at the margin opens or closes a computation.
        if not line.startswith(" "):
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                module[header[2]] = {}
                entry = header[2] if header[1] else entry
            continue
        op = parse_op(line)
        if op is not None:
            computation = next(reversed(module.values()))
            computation[op.name] = op
    return module, entry


def parse_op(line: str) -> Op | None:
    """Read a line, `  ROOT %name = type code(operands), attributes`; None for any other line."""
    # Anything else inside a computation is its closing bracket.
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    # The type is one word, or a tuple in brackets.
    at = start.end()
    end = balanced(line, at) if line[at] == "(" else line.index(" ", at)
    code = line[end:].strip().split("(", 1)[0]
    opened = line.index("(", end)
    closed = balanced(line, opened)
    # A constant's value and a parameter's number stand where others have operands.
    if code in ("constant", "parameter"):
        names = []
        rest = line[opened:]
    else:
        names = re.findall(r"%([\w.\-]+)", line[opened:closed])
        rest = line[closed:]
    is_root = start[1] is not None
    return Op(start[2], line[at:end], code, names, rest, is_root)


def balanced(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    # Brackets of all three kinds count as one.
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


def arrays(shape: str) -> list[Array]:
    """Return the arrays of a type's text."""
    found = []
    for kind, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?", shape):
        # S(n) in a layout is another memory space: on a TPU the vector memory, or semaphores.
        found.append(Array(kind, _integers(dims), "S(" not in layout))
    return found


def _integers(text: str) -> list[int]:
    """Return the numbers of `1,2,3`; [] of no text."""
    return [int(number) for number in text.split(",") if number]


def dims_of(op: Op) -> list[int]:
    """Return the dimensions of an instruction's result, of a tuple's first."""
    return arrays(op.shape)[0].dims


def array_bytes(array: Array, main_memory: bool = True) -> float:
    """Return the bytes of an array; with `main_memory` 0 for one that does not lie there."""
    # What lies in vector memory is reached without main memory.
    if main_memory and not array.in_main_memory:
        return 0.0
    return math.prod(array.dims) * BITS.get(array.kind, 0) / 8


def size(shape: str, main_memory: bool = False) -> float:
    """Return the bytes of a type; with `main_memory` only of its arrays that lie there."""
    return sum(array_bytes(array, main_memory) for array in arrays(shape))


def attribute(op: Op, name: str) -> list[str]:
    """Return the names of the computations that an attribute calls."""
    # One name, or several in braces.
    found = re.search(rf"\b{name}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", op.rest)
    if not found:
        return []
    return [found[1]] if found[1] else re.findall(r"%([\w.\-]+)", found[2])


def called(op: Op, module: Module) -> Computation:
    """Return the body of a fusion."""
    (name,) = attribute(op, "calls")
    return module[name]


def root_of(computation: Computation) -> Op:
    """Return the instruction whose result is the computation's."""
    return next(op for op in computation.values() if op.root)


def constant(op: Op) -> int:
    """Return the value of an integer constant."""
    return int(re.match(r"\((-?\d+)\)", op.rest)[1])


# --- how often instructions run


def trips(op: Op, module: Module, around: float = 1) -> float:
    """Return how often a while loop runs: the compiler's count, or what its condition tells.

    That is the largest integer that the condition knows, over the step, where the body adds a
    constant to what the condition looks at: XLA unrolls loops by two. Where the condition knows no
    number, the bounds are data. Such loops are attention's (kernels/chunked.py), over the tiles
    that the mask leaves of the `around` many of the loop around it: under a causal mask half, and
    half a tile.
    """
    # Where the compiler knows it, it writes it down.
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.rest)
    if known:
        return int(known[1])

    numbers, counters = read_condition(op, module)
    if not numbers:
        return (around + 1) / 2
    steps = added_constants(module[attribute(op, "body")[0]], counters)
    return math.ceil(max(numbers) / max(steps, default=1))


def read_condition(op: Op, module: Module) -> tuple[list[int], list[int]]:
    """Return the integers that a while loop's condition knows.

    And the places in the loop's tuple that it looks at.
    """
    numbers = []
    counters = []
    # The condition's work may be inside a fusion: that is looked through too.
    todo = attribute(op, "condition")
    for name in todo:
        for inner in module[name].values():
            todo += attribute(inner, "calls")
            if inner.code == "get-tuple-element":
                counters.append(int(re.search(r"index=(\d+)", inner.rest)[1]))
            if inner.code == "constant" and re.match(r"[su]\d+\[\]", inner.shape):
                numbers.append(constant(inner))
    return numbers, counters


def added_constants(body: Computation, counters: list[int]) -> list[int]:
    """Return the constants that a loop's `body` adds to the `counters`, places in its tuple."""
    # The body returns the loop's tuple: place n of it is operand n of its root.
    results = root_of(body).operands
    steps = []
    for place in counters:
        if place >= len(results) or body[results[place]].code != "add":
            continue
        for name in body[results[place]].operands:
            if body[name].code == "constant":
                steps.append(constant(body[name]))
    return steps


def walk(
    module: Module, name: str, times: float = 1, fused: bool = False, around: float = 1
) -> Iterator[Visit]:
    """Yield every instruction below the computation `name`, which runs `times` times.

    `around`: how often the innermost loop runs that all of it is in.
    """
    for op in module[name].values():
        yield Visit(op, module[name], name, times, fused)
        if op.code == "while":
            turns = trips(op, module, around)
            for part in ("body", "condition"):
                (inside,) = attribute(op, part)
                yield from walk(module, inside, times * turns, fused, turns)
            continue
        # A fusion's body, the branches of a conditional, a called computation.
        inner = attribute(op, "calls") + attribute(op, "branch_computations")
        if op.code == "call":
            inner += attribute(op, "to_apply")
        is_fused = fused or op.code == "fusion"
        for inside in inner:
            yield from walk(module, inside, times, is_fused, around)


# --- FLOPs


def is_matmul(op: Op) -> bool:
    """Return whether this is a dot, or what a compiler makes of one on a TPU or a GPU."""
    if op.code == "custom-call":
        return 'custom_call_target="__cublas$' in op.rest
    return op.code in ("dot", "convolution")


def matmul_flops(op: Op, computation: Computation) -> float:
    """Return the FLOPs of a matmul: a dot, a TPU's convolution or a GPU's call of cuBLAS."""
    if op.code == "convolution":
        return convolution_flops(op, computation)
    # A multiplication and an addition for each element of the result and each that is summed.
    out = dims_of(op)
    left = dims_of(computation[op.operands[0]])
    if op.code == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
    else:
        quoted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', op.rest)[1]
        contracted = quoted.replace('"', "")
    summed = [left[dimension] for dimension in _integers(contracted)]
    return 2.0 * math.prod(out) * math.prod(summed)


def convolution_flops(op: Op, computation: Computation) -> float:
    """Return the FLOPs of a convolution; a window's places outside the array multiply nothing."""
    out = dims_of(op)
    left = dims_of(computation[op.operands[0]])
    right = dims_of(computation[op.operands[1]])

    # dim_labels names the dimensions of left, right and result: b batch, f features, i and o
    # features in and out, and a digit for each spatial dimension.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    left_labels, right_labels, out_labels = labels.groups()
    rows = out[out_labels.index("b")]
    features_out = out[out_labels.index("f")]
    features_in = right[right_labels.index("i")]
    total = 2.0 * rows * features_out * features_in

    found = re.search(r"window=\{([^}]*)\}", op.rest)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1] if found else ""))
    for dimension in range(len(left_labels) - 2):
        digit = str(dimension)
        total *= places_inside(
            left[left_labels.index(digit)],
            right[right_labels.index(digit)],
            out[out_labels.index(digit)],
            {name: text.split("x")[dimension] for name, text in window.items()},
        )
    return total


def places_inside(left: int, right: int, out: int, window: dict[str, str]) -> float:
    """Count the pairs of output and window places of one dimension that meet an element.

    `left`, `right`, `out`: sizes. `window`: pad, stride, lhs_dilate and rhs_dilate as in HLO.
    """
    low = int(window.get("pad", "0_0").split("_")[0])
    stride = int(window.get("stride", "1"))
    dilated = int(window.get("lhs_dilate", "1"))
    spread = int(window.get("rhs_dilate", "1"))
    first = np.arange(out)[:, None] * stride - low
    at = first + np.arange(right) * spread
    last = (left - 1) * dilated
    is_inside = (at >= 0) & (at <= last)
    is_element = at % dilated == 0
    return float((is_inside & is_element).sum())


def kernel_flops(op: Op, computation: Computation) -> float:
    """Return the FLOPs of a Pallas attention kernel, told by its name; 0 for any other call."""
    matmuls = 0
    for name, count in KERNELS.items():
        if op.name.startswith(name):
            matmuls = count
    if not matmuls:
        return 0.0
    # The largest of four dimensions are the queries.
    operands = [dims_of(computation[name]) for name in op.operands]
    candidates = [dims for dims in operands if len(dims) == 4]
    batch, heads, length, width = max(candidates, key=math.prod)
    return 0.5 * matmuls * 2.0 * batch * heads * length * length * width


# --- main memory


def memory_bytes(op: Op, computation: Computation, module: Module) -> float:
    """Return the bytes of main memory read and written by an instruction outside fusions.

    Slices count as what is sliced.
    """
    if op.code in FREE or op.code.endswith("-done") or "AllocateBuffer" in op.rest:
        return 0.0
    if op.code in ("copy-start", "slice-start"):
        return copied_bytes(op)
    is_fusion = op.code == "fusion"
    body = called(op, module) if is_fusion else {op.name: op}

    # A collective in flight goes through the fusions that overlap with it, in the place of an
    # operand: nothing moves. {result: operand}, by their numbers.
    aliases: dict[str, str] = {}
    if is_fusion and any(inner.code in COLLECTIVES for inner in body.values()):
        aliases = dict(re.findall(r"\{(\d*)\}: \((\d+), \{\}", op.rest))

    # Written: the results; of an update in place, what is updated.
    root = next((inner for inner in body.values() if inner.root), op)
    if root.code == "dynamic-update-slice":
        update = (body if is_fusion else computation)[root.operands[1]]
        total = size(update.shape) * ("S(" not in op.shape)
    else:
        total = written_bytes(op, aliases)

    # Read: the operands.
    for number, name in enumerate(op.operands):
        whole = size(computation[name].shape, main_memory=True)
        if whole and str(number) not in aliases.values():
            total += min(whole, bytes_read(name, {op.name: op}, module))
    return total


def copied_bytes(op: Op) -> float:
    """Return the bytes that a copy between two memories moves in main memory."""
    source, target = arrays(op.shape)[:2]
    elements = min(math.prod(source.dims), math.prod(target.dims))
    moved = elements * BITS[source.kind] / 8
    return moved * (source.in_main_memory + target.in_main_memory)


def written_bytes(op: Op, aliases: dict[str, str]) -> float:
    """Return the bytes of an instruction's results, without those that `aliases` passes on."""
    results = arrays(op.shape)
    if op.code.endswith("-start") and op.shape.startswith("(") and op.code != "all-reduce-start":
        # The operands are named again before the results.
        results = results[len(op.operands) : 2 * len(op.operands)]
    if "" in aliases:
        return 0.0
    total = 0.0
    for number, result in enumerate(results):
        if str(number) not in aliases:
            total += array_bytes(result)
    return total


def bytes_read(name: str, computation: Computation, module: Module) -> float:
    """Return the bytes of the array `name` that the instructions of `computation` read.

    Of a slice, what is sliced; infinite if not known.
    """
    # Every use of the array counts; the caller knows that no more than all of it is read.
    total = 0.0
    for op in computation.values():
        if name not in op.operands:
            continue
        if op.code in ("dynamic-slice", "slice", "gather"):
            total += size(op.shape)
        elif op.code == "bitcast":
            total += bytes_read(op.name, computation, module)
        elif op.code == "fusion":
            inner = called(op, module)
            inside = parameter_name(inner, op.operands.index(name))
            total += bytes_read(inside, inner, module)
            if result_name(inner) == inside:
                # It is passed on as it is.
                total += bytes_read(op.name, computation, module)
        elif op.code != "dynamic-update-slice" or op.operands[0] != name:
            # All else reads the whole array; an update is written in place.
            return math.inf
    return total


def parameter_name(computation: Computation, number: int) -> str:
    """Return the name of a computation's parameter, by its number."""
    text = f"({number})"
    return next(
        op.name
        for op in computation.values()
        if op.code == "parameter" and op.rest.startswith(text)
    )


def result_name(computation: Computation) -> str:
    """Return the name of what the computation returns, bitcasts taken off."""
    # A bitcast is another view of the same bytes.
    result = root_of(computation)
    while result.code == "bitcast":
        result = computation[result.operands[0]]
    return result.name


# --- collectives


def one_group(op: Op, devices: int) -> list[int]:
    """Return the devices that one of the instruction's groups, or one of its pairs, joins.

    XLA writes groups in three ways; without any, all devices are one group.
    """
    # A permutation has pairs, one collective of devices lists of them.
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest)
    if listed:
        return _integers(listed[1])

    # [groups, devices of a group] <= [shape of all devices], transposed by T(...).
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.rest)
    if iota:
        ids = numbered(devices, iota[2], iota[3])
        return list(ids.reshape(_integers(iota[1]))[0])

    # The axes of a mesh, whose devices may be in another order, then those that are joined.
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\)?)? \{([^}]*)\}", op.rest
    )
    if mesh:
        ids = np.arange(devices)
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", mesh[2] or "")
        if order:
            ids = numbered(devices, order[1], order[2])
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        joined = re.findall(r"'(\w+)'", mesh[3])
        one = tuple(slice(None) if name in joined else 0 for name in axes)
        ids = ids.reshape(list(axes.values()))
        return list(ids[one].reshape(-1))
    return list(range(devices))


def numbered(devices: int, shape: str, transposed: str | None) -> np.ndarray:
    """Return the numbers of the devices in the `shape`, its axes `transposed`, both as `1,2,3`."""
    ids = np.arange(devices).reshape(_integers(shape))
    return ids.transpose(_integers(transposed)) if transposed else ids


class Collective(NamedTuple):
    """A collective."""

    kind: str
    """One of COLLECTIVES."""
    axes: str
    """The mesh's axes that it goes over, joined by +; empty where it joins no two chips."""
    chips: int
    """Chips of a group."""
    received: float
    """Bytes that a chip receives."""


def collective(op: Op, name: str, computation: Computation, mesh: dict[str, int]) -> Collective:
    """Read a collective.

    `name`: the computation that it is in. `mesh`: sizes by axis.
    """
    kind = op.code.removesuffix("-start")
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        # A TPU's reduce-scatter is a fusion of an all-reduce and a slice of it.
        kind = "reduce-scatter"

    # The axes along which the devices of a group differ.
    group = one_group(op, math.prod(mesh.values()))
    places = np.unravel_index(group, tuple(mesh.values()))
    axes = []
    for axis, row in zip(mesh, places, strict=True):
        if len(set(row.tolist())) > 1:
            axes.append(axis)

    # Of a ring: each chip receives all but its own part; of an all-reduce twice.
    share = 1 - 1 / len(group)
    taken = 0.0
    for operand in op.operands:
        taken += size(computation[operand].shape)
    received = {
        "all-gather": taken * (len(group) - 1),
        "all-reduce": 2 * taken * share,
        "reduce-scatter": taken * share,
        "all-to-all": taken * share,
        "collective-permute": taken,
    }[kind]
    return Collective(kind, "+".join(axes), len(group), received)


def channel_of(op: Op) -> tuple[str, str | None] | None:
    """Return what the parts of an asynchronous collective share; None without a channel."""
    channel = re.search(r"channel_id=(\d+)", op.rest)
    if not channel:
        return None
    source = re.search(r'op_name="([^"]*)"', op.rest)
    return channel[1], source[1] if source else None


# --- a program


def cost(text: str, mesh: dict[str, int]) -> Cost:
    """Return what the compiled program `text` costs a chip of a mesh, sizes by axis."""
    # Every instruction below the entry, as often as it runs.
    module, entry = parse(text)
    total = Cost()
    seen = set()
    for op, computation, name, times, fused in walk(module, entry):
        # Computed, and moved in the chip.
        if is_matmul(op):
            total.flops += times * matmul_flops(op, computation)
        elif op.code == "custom-call":
            total.flops += times * kernel_flops(op, computation)
        if not fused:
            total.memory += times * memory_bytes(op, computation, module)
        if op.code.removesuffix("-start") not in COLLECTIVES:
            continue

        # Received. An asynchronous collective is spread over the fusions that overlap with it,
        # under one channel: it counts once.
        if fused:
            channel = channel_of(op)
            if channel in seen:
                continue
            if channel is not None:
                seen.add(channel)
        kind, axes, chips, received = collective(op, name, computation, mesh)
        if axes:
            total.groups[kind, chips] = total.groups.get((kind, chips), 0.0) + times
            count, so_far, largest = total.moved.get((kind, axes), (0.0, 0.0, 0.0))
            total.moved[kind, axes] = (
                count + times,
                so_far + times * received,
                max(largest, received),
            )
    return total
