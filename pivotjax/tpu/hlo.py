"""The text of an optimised HLO module as data: computations, instructions, shapes, and how often each one runs.

XLA prints one instruction a line, `%name = SHAPE opcode(%operands), attributes`, inside computations that others call
(`calls=`, `body=`, `condition=`, `to_apply=`, `branch_computations=`). XLA's own cost analysis counts a loop's body
once; what is needed here is the body times its trip count, which is read from the loop's condition.
Grammar: https://openxla.org/xla/operation_semantics and the printer's output.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_NAME = re.compile(r"%([^\s,()=]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[^\s,]+)")  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


class Array(NamedTuple):
    """One array of a shape.

    Fields:
        dims: its sizes.
        bytes: of its elements, without the padding of a layout's tiles.
        space: memory space of the layout: 0 is HBM, 1 the vector memory, others registers and semaphores.
    """

    dims: tuple[int, ...]
    bytes: int
    space: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result: one, or those of a tuple."""
        return arrays(self.shape)

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs once each time it runs (loops aside); what is asynchronous runs at its start."""
        if self.opcode in ("async-update", "async-done"):
            return ()
        return tuple(name.strip().lstrip("%") for found in _CALLED.findall(self.attributes)
                     for name in found.strip("{}").split(","))  # fmt: skip

    def attribute(self, name: str) -> str | None:
        """The value of `name=value` where it is a word."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The value of `name={1,2,3}`; empty where it is absent."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they are printed: that of the schedule where there is one."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: list[str] = field(default_factory=list)

    @property
    def result(self) -> Instruction:
        """The root instruction."""
        return self.instructions[self.root[0]]

    def parameter(self, number: int) -> Instruction | None:
        """The instruction `parameter(number)`."""
        return next(
            (i for i in self.instructions.values() if i.opcode == "parameter" and i.operands == (str(number),)), None
        )


@dataclass(frozen=True)
class Program:
    """A module: its computations and the name of the entry."""

    computations: dict[str, Computation]
    entry: str

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program (of a conditional, every branch once)."""
        counts: dict[str, int] = {}
        self._run(self.entry, 1, counts)
        return counts

    @cached_property
    def loop_of(self) -> dict[str, tuple[Computation, Instruction]]:
        """The loop of which a computation is the body, and where that stands."""
        return {i.attribute("body"): (computation, i) for computation in self.computations.values()
                for i in computation.instructions.values() if i.opcode == "while"}  # fmt: skip

    @cached_property
    def fused(self) -> frozenset[str]:
        """Computations that are the inside of a fusion or a reducer: they move nothing through HBM by themselves."""
        return frozenset(
            name for computation in self.computations.values() for i in computation.instructions.values()
            if i.opcode not in ("call", "conditional", "async-start") for name in i.called
        )  # fmt: skip

    @cached_property
    def started_by(self) -> dict[str, tuple[Computation, Instruction]]:
        """Of each computation that runs asynchronously, the `async-start` that starts it, and where that stands."""
        found: dict[str, tuple[Computation, Instruction]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                waiting = list(instruction.called) if instruction.opcode == "async-start" else []
                while waiting:
                    name = waiting.pop()
                    found[name] = (computation, instruction)
                    waiting += [inner for i in self.computations[name].instructions.values() for inner in i.called]
        return found

    @cached_property
    def unknown_loops(self) -> tuple[str, ...]:
        """Loops whose trip count is not known; they count as one."""
        return tuple(
            i.name for name in self.runs for i in self.computations[name].instructions.values()
            if i.opcode == "while" and trip_count(self, self.computations[name], i) is None
        )  # fmt: skip

    def _run(self, name: str, times: int, counts: dict[str, int]) -> None:
        counts[name] = counts.get(name, 0) + times
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = trip_count(self, computation, instruction)
                self._run(instruction.attribute("body"), times * (1 if trips is None else trips), counts)
            for called in instruction.called:
                if called in self.computations:
                    self._run(called, times, counts)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays named in a shape's text, in order."""
    return tuple(_array(*found) for found in _ARRAY.findall(shape))


def _array(kind: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(n) for n in dims.split(",") if n)
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    space = re.search(r"S\((\d+)\)", layout)
    return Array(sizes, math.prod(sizes) * bits // 8, int(space[1]) if space else 0)


def parse(text: str) -> Program:
    """The module that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry, now = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            now = computations.setdefault(header[2], Computation(header[2]))
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            now = None
        elif now is not None and " = " in line:
            _add(now, line)
    return Program(computations, entry)


def _add(computation: Computation, line: str) -> None:
    left, right = line.split(" = ", 1)
    name = left.strip().removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    opcode, inside = rest[:start], rest[start + 1 : stop]
    operands = (inside.strip(),) if opcode in ("parameter", "constant") else tuple(_NAME.findall(inside))
    computation.instructions[name] = Instruction(name, shape, opcode, operands, rest[stop + 1 :])
    if left.strip().startswith("ROOT "):
        computation.root.append(name)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]}")


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body: from its annotation, else from its condition `counter < limit`.

    The counter starts at its value in the loop's initial tuple and goes up by a constant: 1 in loops that `lax.scan`
    makes, more where XLA unrolled them or takes a product apart. None where it cannot be read.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.attribute("condition")]
    sides = _comparison(program, condition)
    if sides is None:
        return None
    first, limit = (_initial(program, computation, loop, side) for side in sides)
    step = _stride(program, program.computations[loop.attribute("body")], sides[0])
    return max(0, math.ceil((limit - first) / step)) if step and None not in (first, limit) else None


def _comparison(program: Program, condition: Computation) -> tuple[Instruction, Instruction] | None:
    """Both sides of a condition's `left < right`, inside a fusion or not, as instructions of the condition."""
    root = inner = condition.result
    where = condition
    if root.opcode == "fusion":
        where = program.computations[root.called[0]]
        inner = where.result
    direction = inner.attribute("direction")
    if inner.opcode != "compare" or direction not in ("LT", "GT"):
        return None
    sides = [where.instructions[name] for name in inner.operands]
    if where is not condition:
        sides = [condition.instructions[root.operands[int(side.operands[0])]] if side.opcode == "parameter" else side
                 for side in sides]  # fmt: skip
    return (sides[0], sides[1]) if direction == "LT" else (sides[1], sides[0])


def _stride(program: Program, body: Computation, counter: Instruction) -> int:
    """What one run of a loop's body adds to its counter; 0 where it cannot be read."""
    index, result = counter.attribute("index"), body.result
    if index is None or result.opcode != "tuple":
        return 0
    counters, added = _sum(program, body, result.operands[int(index)], index, ()) or (0, 0)
    return added if counters == 1 else 0


def _sum(
    program: Program, computation: Computation, name: str, index: str, given: tuple[tuple[int, int] | None, ...]
) -> tuple[int, int] | None:
    """A value as so many times the loop's counter plus a constant; None where it is something else. `given` are the
    values of a fusion's parameters."""
    one = computation.instructions[name]
    if one.opcode == "constant":
        value = _constant(one)
        return None if value is None else (0, value)
    if one.opcode == "get-tuple-element":
        return (1, 0) if one.attribute("index") == index else None
    if one.opcode == "parameter":
        return given[int(one.operands[0])] if given else None
    if one.opcode not in ("add", "copy", "bitcast", "fusion"):
        return None
    sides = tuple(_sum(program, computation, operand, index, given) for operand in one.operands)
    if one.opcode == "fusion":
        inside = program.computations[one.called[0]]
        return _sum(program, inside, inside.root[0], index, sides)
    return None if None in sides else tuple(map(sum, zip(*sides)))


def _initial(program: Program, outer: Computation, loop: Instruction, side: Instruction) -> int | None:
    """A side of a loop's condition as the loop starts: a constant, or an entry of the tuple that it starts from."""
    if side.opcode != "get-tuple-element":
        return _constant(side)
    return _entry(program, outer, outer.instructions[loop.operands[0]], int(side.attribute("index")))


def _entry(program: Program, computation: Computation, start: Instruction, index: int) -> int | None:
    """The value of one entry of a tuple; where it comes unchanged from a loop around this one, its value there."""
    if start.opcode != "tuple":
        return None
    entry = computation.instructions[start.operands[index]]
    while entry.opcode in ("copy", "bitcast"):
        entry = computation.instructions[entry.operands[0]]
    if entry.opcode != "get-tuple-element":
        return _constant(entry)
    number, source = int(entry.attribute("index")), computation.instructions[entry.operands[0]]
    around = program.loop_of.get(computation.name)
    if source.opcode != "parameter" or around is None:
        return None
    outer, loop = around
    result = computation.result
    kept = result.opcode == "tuple" and computation.instructions[result.operands[number]]
    if not kept or kept.opcode != "get-tuple-element" or int(kept.attribute("index")) != number:
        return None
    return _entry(program, outer, outer.instructions[loop.operands[0]], number)


def _constant(instruction: Instruction) -> int | None:
    text = instruction.operands[0] if instruction.opcode == "constant" else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
