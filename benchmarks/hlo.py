"""Facts of a program that XLA has compiled for a GPU, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)(.*)$")
_CALLED = re.compile(r"(?:to_apply|body|\w+_computation)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
_MOVE_NOTHING = {
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Instruction(NamedTuple):
    """An instruction of a computation: what it makes, by which operation, and from what."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    called: list[str]


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation of a program, and the name of its entry."""
    found: dict[str, list[Instruction]] = {}
    current = entry = ""
    for line in text.splitlines():
        begin = _COMPUTATION.match(line)
        if begin:
            current = begin[2]
            found[current] = []
            entry = current if begin[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            found[current].append(_instruction(*match.groups()))
    return found, entry


def _instruction(name: str, shape: str, operation: str, inside: str, rest: str) -> Instruction:
    """Return an instruction from the parts of its line."""
    called = [
        one.lstrip("% ") for pair in _CALLED.findall(rest) for one in ",".join(pair).split(",")
    ]
    return Instruction(
        name, shape, operation, re.findall(r"%([\w.-]+)", inside), [one for one in called if one]
    )


def bytes_moved(text: str, in_branches: bool) -> int:
    """Return the bytes that the kernels of a program read and write.

    Each operand of a kernel is taken to be read once, each result to be written once.

    Args:
        text: the program after all optimizations.
        in_branches: whether loops run once and conditions take their larger branch; else loops
            do not run, and conditions take their smaller branch.
    """
    found, entry = computations(text)

    def of(computation: str) -> int:
        """Return the bytes that a computation moves."""
        shapes = {one.name: one.shape for one in found[computation]}
        return sum(of_instruction(one, shapes) for one in found[computation])

    def of_instruction(one: Instruction, shapes: dict[str, str]) -> int:
        """Return the bytes that an instruction moves; `shapes` has those of its operands."""
        if one.operation in _MOVE_NOTHING:
            return 0
        if one.operation == "call":
            return of(one.called[0])
        if one.operation == "while":
            return max(map(of, one.called)) if in_branches else 0
        if one.operation == "conditional":
            return (max if in_branches else min)(map(of, one.called))
        return _size(one.shape) + sum(_size(shapes[name]) for name in one.operands)

    return of(entry)


def _size(shape: str) -> int:
    """Return the number of bytes of an array or a tuple, from its shape as a text."""
    return sum(
        _BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _ARRAY.findall(shape)
        if dtype in _BYTES
    )


class Schedule(NamedTuple):
    """What the host does to run a program on a GPU.

    Attributes:
        kernels: number of kernels and copies.
        graphs: number of CUDA graphs that it launches.
        waits: number of conditions and loops for which it waits for a value of the device.
    """

    kernels: int
    graphs: int
    waits: int


def schedule(thunks: str) -> Schedule:
    """Return what the host does, from the text of XLA's sequence of thunks."""
    kernels = graphs = waits = 0
    for kind, is_in_graph in _thunks(thunks):
        if kind == "CommandBuffer":
            graphs += 1
        elif kind in ("While", "Conditional"):
            waits += not is_in_graph
        elif kind != "Sequential":
            kernels += 1
    return Schedule(kernels, graphs, waits)


def _thunks(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the kind of each thunk, and whether it is a part of a CUDA graph."""
    graph_depth = None
    for line in text.splitlines():
        match = re.match(r"^(\s*)\d+: k(\w+)", line)
        if match is None:
            continue
        depth, kind = len(match[1]), match[2]
        if graph_depth is not None and depth <= graph_depth:
            graph_depth = None
        yield kind, graph_depth is not None
        if kind == "CommandBuffer" and graph_depth is None:
            graph_depth = depth
