"""What devices send each other in one step: by kind and size, and whether computing goes on meanwhile."""

import re
from typing import NamedTuple

import numpy as np

from pivotjax.tpu import flops
from pivotjax.tpu.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_START, _DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'


class Collective(NamedTuple):
    """One collective of the program.

    Fields:
        kind: one of KINDS.
        times: how often a step runs it.
        bytes: its larger side on one device, once: what an all-gather makes, what a reduce-scatter takes.
        groups: the devices that exchange with each other, by their number in the mesh.
        overlapped: it runs beside matrix products.
        where: `op_name` of what it was made for.
    """

    kind: str
    times: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    overlapped: bool
    where: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step by the ring algorithm (Thakur et al. 2005; all-reduce: twice)."""
        size = len(self.groups[0])
        share = 1.0 if self.kind == "collective-permute" else (size - 1) / size
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def find(program: Program, devices: int) -> list[Collective]:
    """All collectives that the program runs on so many devices.

    TPU's compiler splits an asynchronous collective into a start, the products that run beside it, each with a copy of
    it inside, and a done: it is counted at its start.
    """
    beside = _channels_beside_products(program)
    found = []
    for name, times in program.runs.items():
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            kind = _kind(computation, instruction)
            if kind is None or _is_continued(program, computation):
                continue
            overlapped = instruction.attribute("channel_id") in beside or _waits(
                program, *program.started_by.get(name, (computation, instruction))
            )
            sizes = [a.bytes for a in instruction.arrays] + [
                a.bytes for operand in instruction.operands for a in computation.instructions[operand].arrays
            ]
            found.append(Collective(kind, times, _size(instruction, sizes), _groups(instruction, devices),
                                    overlapped, instruction.op_name))  # fmt: skip
    return [one for one in found if one.kind == "collective-permute" or len(one.groups[0]) > 1]


def _kind(computation: Computation, instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    return "reduce-scatter" if computation.name.startswith("all-reduce-scatter") else kind


def _size(instruction: Instruction, sizes: list[int]) -> int:
    """The larger side; a variadic all-reduce moves all of its operands."""
    made = sum(a.bytes for a in instruction.arrays)
    return max(sizes) if instruction.opcode.endswith("-start") else max(made, *sizes)


def _is_continued(program: Program, computation: Computation) -> bool:
    """Whether a computation holds a copy of a collective that was started before."""
    return computation.name.startswith("async_collective_fusion") or _DONE in computation.result.attributes


def _channels_beside_products(program: Program) -> set[str | None]:
    """Channels of the collectives that stand inside a fusion with a product."""
    return {
        i.attribute("channel_id")
        for name in program.runs if name.startswith("async_collective_fusion")
        for i in program.computations[name].instructions.values()
        if i.opcode in KINDS and _has_product(program, program.computations[name])
    }  # fmt: skip


def _waits(program: Program, computation: Computation, instruction: Instruction) -> bool:
    """Whether a product is scheduled between a start, or the update that hands it its operands, and its done."""
    if not instruction.opcode.endswith("-start"):
        return False
    after = list(computation.instructions.values())
    after, now, beside = after[after.index(instruction) + 1 :], instruction.name, False
    for other in after:
        if other.opcode.endswith("-done") and now in other.operands:
            return beside
        if other.opcode == "async-update" and now in other.operands:
            now, beside = other.name, False
        beside = beside or _is_product(program, computation, other)
    return beside


def _is_product(program: Program, computation: Computation, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        return any(_has_product(program, program.computations[name]) for name in instruction.called)
    return flops.of_instruction(computation, instruction) > 0


def _has_product(program: Program, computation: Computation) -> bool:
    return any(_is_product(program, computation, i) for i in computation.instructions.values())


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, written in one of XLA's three ways; none written: all devices."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\{?(\d+,\d+)", pairs[1]))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        return _rows(np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(shape))
    mesh = re.search(r"replica_groups=(?:@?mesh)?\[?(.*?)\]? \{(.*?)\}", text)
    if mesh and "=" in mesh[1]:
        return _along(re.findall(r"'([^']+)'=(\d+)", mesh[1]), re.findall(r"'([^']+)'", mesh[2]))
    return (tuple(range(devices)),)


def _along(axes: list[tuple[str, str]], named: list[str]) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh."""
    names, shape = [name for name, _ in axes], [int(size) for _, size in axes]
    moved = [names.index(name) for name in named]
    rest = [i for i in range(len(names)) if i not in moved]
    size = int(np.prod([shape[i] for i in moved]))
    return _rows(np.arange(np.prod(shape)).reshape(shape).transpose(rest + moved).reshape(-1, size))


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in row) for row in groups)
