"""What a compiled program does on one chip, read from its HLO: matmul FLOPs, bytes of memory and of collectives.

XLA's own cost analysis counts the body of a loop once; here every loop counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
        "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "partition-id", "iota", "async-start", "async-update", "opt-barrier"}  # fmt: skip
# Matmuls of [T, H] x [H, T] size per query head in our Pallas kernels (kernels/flash.py), half of each by causality.
KERNELS = {"flash_forward": 2, "flash_dq": 3, "flash_dkv": 4}


class Op(NamedTuple):
    """An instruction; `shape` is its type's text, `rest` what follows its operands."""

    name: str
    shape: str
    code: str
    operands: list[str]
    rest: str
    root: bool


Computation = dict[str, Op]


@dataclasses.dataclass
class Cost:
    """Of one run of a program on one chip."""

    flops: float = 0.0
    """Of matmuls and attention kernels."""
    memory: float = 0.0
    """Bytes read from and written to the chip's main memory."""
    moved: dict[tuple[str, str], tuple[float, float, float]] = dataclasses.field(
        default_factory=dict
    )
    """(collective, mesh axes) -> [times run, bytes that the chip receives, and of these by the largest one]."""


def balanced(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the entry's name."""
    module: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                module[header[2]] = {}
                entry = header[2] if header[1] else entry
            continue
        if not (start := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            continue
        at = start.end()
        end = balanced(line, at) if line[at] == "(" else line.index(" ", at)
        code = line[end:].strip().split("(", 1)[0]
        opened = line.index("(", end)
        closed = balanced(line, opened)
        names = (
            []
            if code in ("constant", "parameter")
            else re.findall(r"%([\w.\-]+)", line[opened:closed])
        )
        # A constant's value and a parameter's number stand where others have operands.
        rest = line[opened:] if code in ("constant", "parameter") else line[closed:]
        next(reversed(module.values()))[start[2]] = Op(
            start[2], line[at:end], code, names, rest, bool(start[1])
        )
    return module, entry


def arrays(shape: str) -> list[tuple[str, list[int], bool]]:
    """(element type, dimensions, whether it lies in main memory) of each array in a type's text."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?", shape)
    # S(n) in a layout is another memory space: on a TPU the vector memory, or semaphores.
    return [
        (kind, [int(d) for d in dims.split(",") if d], "S(" not in layout)
        for kind, dims, layout in found
    ]


def array_bytes(array: tuple[str, list[int], bool], main_memory: bool = True) -> float:
    """Of one of `arrays`; with `main_memory` 0 for one that does not lie there."""
    kind, dims, main = array
    return math.prod(dims) * BITS.get(kind, 0) / 8 * (main or not main_memory)


def size(shape: str, main_memory: bool = False) -> float:
    """Bytes of a type; with `main_memory` only of its arrays that lie there."""
    return sum(array_bytes(array, main_memory) for array in arrays(shape))


def attribute(op: Op, name: str) -> list[str]:
    """Names of the computations that an attribute calls."""
    found = re.search(rf"\b{name}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", op.rest)
    return [] if not found else [found[1]] if found[1] else re.findall(r"%([\w.\-]+)", found[2])


def trips(op: Op, module: dict[str, Computation], around: float = 1) -> float:
    """How often a while loop runs: the compiler's count, else the largest integer that its condition knows.

    That over the step, where the body adds a constant to what the condition looks at: XLA unrolls loops by two. Where
    the condition knows no number, the bounds are data. Such loops are attention's (kernels/chunked.py), over the tiles
    that the mask leaves of the `around` many of the loop around it: under a causal mask half, and half a tile.
    """
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.rest):
        return int(known[1])
    numbers, todo, counters = [], attribute(op, "condition"), []
    for name in todo:
        for inner in module[name].values():
            todo += attribute(inner, "calls")
            if inner.code == "get-tuple-element":
                counters.append(int(re.search(r"index=(\d+)", inner.rest)[1]))
            if inner.code == "constant" and re.match(r"[su]\d+\[\]", inner.shape):
                numbers.append(int(re.match(r"\((-?\d+)\)", inner.rest)[1]))
    if not numbers:
        return (around + 1) / 2
    body = module[attribute(op, "body")[0]]
    results = next(x for x in body.values() if x.root).operands
    added = [
        body[results[i]].operands
        for i in counters
        if i < len(results) and body[results[i]].code == "add"
    ]
    steps = [
        int(re.match(r"\((-?\d+)\)", body[x].rest)[1])
        for xs in added
        for x in xs
        if body[x].code == "constant"
    ]
    return -(-max(numbers) // max(steps, default=1))


def walk(
    module: dict[str, Computation],
    name: str,
    times: float = 1,
    fused: bool = False,
    around: float = 1,
) -> Iterator[tuple]:
    """(instruction, its computation, the computation's name, how often it runs, whether it is inside a fusion).

    `around`: how often the innermost loop runs that all of it is in.
    """
    for op in module[name].values():
        yield op, module[name], name, times, fused
        if op.code == "while":
            n = trips(op, module, around)
            yield from walk(module, attribute(op, "body")[0], times * n, fused, n)
            yield from walk(module, attribute(op, "condition")[0], times * n, fused, n)
            continue
        inner = attribute(op, "calls") + attribute(op, "branch_computations")
        inner += attribute(op, "to_apply") if op.code == "call" else []
        for called in inner:
            yield from walk(module, called, times, fused or op.code == "fusion", around)


def matmul_flops(op: Op, computation: Computation) -> float:
    """Of a dot or of a convolution, which is what a TPU's compiler makes of a dot."""
    (_, out, _), *_ = arrays(op.shape)
    (_, left, _), (_, right, _) = (arrays(computation[name].shape)[0] for name in op.operands[:2])
    if op.code == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        return (
            2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
        )
    sides = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    window = dict(
        re.findall(
            r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.rest) or ["", ""])[1]
        )
    )
    total = 2.0 * out[sides[3].index("b")] * out[sides[3].index("f")] * right[sides[2].index("i")]
    for n in range(len(sides[1]) - 2):
        of = lambda key, default, n=n: window[key].split("x")[n] if key in window else default
        low = int(of("pad", "0_0").split("_")[0])
        stride, dilated, spread = (
            int(of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        places = np.arange(out[sides[3].index(str(n))])[:, None] * stride - low
        at = places + np.arange(right[sides[2].index(str(n))]) * spread
        inside = (
            (at >= 0) & (at <= (left[sides[1].index(str(n))] - 1) * dilated) & (at % dilated == 0)
        )
        total *= float(inside.sum())  # a window's places outside the array multiply nothing
    return total


def kernel_flops(op: Op, computation: Computation) -> float:
    """Of a Pallas attention kernel, by its name; 0 for any other call."""
    matmuls = next((n for name, n in KERNELS.items() if op.name.startswith(name)), 0)
    if not matmuls:
        return 0.0
    operands = [arrays(computation[name].shape)[0][1] for name in op.operands]
    batch, heads, length, width = max(
        (dims for dims in operands if len(dims) == 4), key=math.prod
    )  # the queries
    return 0.5 * matmuls * 2.0 * batch * heads * length * length * width


def memory_bytes(op: Op, computation: Computation, module: dict[str, Computation]) -> float:
    """Main memory read and written by an instruction outside fusions; slices count as what is sliced."""
    if op.code in FREE or op.code.endswith("-done") or "AllocateBuffer" in op.rest:
        return 0.0
    if op.code in ("copy-start", "slice-start"):  # a copy between two memories
        (kind, first, first_main), (_, second, second_main) = arrays(op.shape)[:2]
        return (
            min(math.prod(first), math.prod(second)) * BITS[kind] / 8 * (first_main + second_main)
        )
    body = module[attribute(op, "calls")[0]] if op.code == "fusion" else {op.name: op}
    root = next((x for x in body.values() if x.root), op)
    # A collective in flight goes through the fusions that overlap with it, in the place of an operand: nothing moves.
    passing = any(x.code in COLLECTIVES for x in body.values()) and op.code == "fusion"
    aliases = dict(re.findall(r"\{(\d*)\}: \((\d+), \{\}", op.rest)) if passing else {}
    written = arrays(op.shape)
    if op.code.endswith("-start") and op.shape.startswith("(") and op.code != "all-reduce-start":
        written = written[len(op.operands) : 2 * len(op.operands)]  # after the operands again
    total = sum(array_bytes(x) for i, x in enumerate(written) if not aliases.keys() & {"", str(i)})
    if root.code == "dynamic-update-slice":
        update = (body if op.code == "fusion" else computation)[root.operands[1]]
        total = size(update.shape) * ("S(" not in op.shape)
    for i, name in enumerate(op.operands):
        whole = size(computation[name].shape, main_memory=True)
        if whole and str(i) not in aliases.values():
            total += min(whole, bytes_read(name, {op.name: op}, module))
    return total


def bytes_read(name: str, computation: Computation, module: dict[str, Computation]) -> float:
    """Of the array `name` by the instructions of `computation`: of a slice, what is sliced; infinite if not known."""
    total = 0.0
    for op in computation.values():
        if name not in op.operands:
            continue
        if op.code in ("dynamic-slice", "slice", "gather"):
            total += size(op.shape)
        elif op.code == "bitcast":
            total += bytes_read(op.name, computation, module)
        elif op.code == "fusion":
            inner = module[attribute(op, "calls")[0]]
            number = f"({op.operands.index(name)})"
            inside = next(
                x.name
                for x in inner.values()
                if x.code == "parameter" and x.rest.startswith(number)
            )
            total += bytes_read(inside, inner, module)
            result = next(x for x in inner.values() if x.root)
            while result.code == "bitcast":
                result = inner[result.operands[0]]
            if result.name == inside:  # passed on as it is
                total += bytes_read(op.name, computation, module)
        elif not (
            op.code == "dynamic-update-slice" and op.operands[0] == name
        ):  # which is written in place
            return math.inf
    return total


def one_group(op: Op, devices: int) -> list[int]:
    """The devices that one of the instruction's groups, or one of its pairs, joins."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest):
        return [int(x) for x in listed[1].split(",")]
    turned = lambda text: [int(x) for x in text.split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.rest):
        ids = np.arange(devices).reshape(turned(iota[2]))
        return list(
            (ids.transpose(turned(iota[3])) if iota[3] else ids).reshape(turned(iota[1]))[0]
        )
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\)?)? \{([^}]*)\}", op.rest
    ):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(devices)
        if named[2] and (order := re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", named[2])):
            ids = ids.reshape(turned(order[1]))
            ids = ids.transpose(turned(order[2])) if order[2] else ids
        ids = ids.reshape(list(axes.values()))
        joined = re.findall(r"'(\w+)'", named[3])
        return list(ids[tuple(slice(None) if name in joined else 0 for name in axes)].reshape(-1))
    return list(range(devices))


def collective(
    op: Op, name: str, computation: Computation, mesh: dict[str, int]
) -> tuple[str, str, float]:
    """(kind, mesh axes joined by +, bytes that a chip receives) of a collective inside the computation `name`."""
    kind = op.code.removesuffix("-start")
    group = one_group(op, math.prod(mesh.values()))
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    axes = "+".join(a for a, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
    share = 1 - 1 / len(group)
    taken = sum(size(computation[x].shape) for x in op.operands)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU's reduce-scatter is a fusion of an all-reduce and a slice of it
    received = {
        "all-gather": taken * (len(group) - 1),
        "all-reduce": 2 * taken * share,
        "reduce-scatter": taken * share,
        "all-to-all": taken * share,
        "collective-permute": taken,
    }[kind]
    return kind, axes, received


def cost(text: str, mesh: dict[str, int]) -> Cost:
    """What the compiled program `text` costs a chip of a mesh of these sizes."""
    module, entry = parse(text)
    total, seen = Cost(), set()
    for op, computation, name, times, fused in walk(module, entry):
        if op.code in ("dot", "convolution"):
            total.flops += times * matmul_flops(op, computation)
        elif op.code == "custom-call":
            total.flops += times * kernel_flops(op, computation)
        if not fused:
            total.memory += times * memory_bytes(op, computation, module)
        if op.code.removesuffix("-start") in COLLECTIVES:
            kind, axes, received = collective(op, name, computation, mesh)
            # An asynchronous one is spread over the fusions that overlap with it, under one channel.
            channel, source = (
                re.search(x, op.rest) for x in (r"channel_id=(\d+)", r'op_name="([^"]*)"')
            )
            same = (channel[1], source and source[1]) if channel and fused else None
            if same in seen:
                continue
            seen |= {same} - {None}
            if axes:
                so_far = total.moved.get((kind, axes), (0.0, 0.0, 0.0))
                sums = so_far[0] + times, so_far[1] + times * received
                total.moved[kind, axes] = (*sums, max(so_far[2], received))
    return total
