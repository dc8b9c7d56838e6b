"""Bytes that a step moves between HBM and the chip: an estimate from the scheduled HLO.

Every instruction that is not inside a fusion reads its operands and writes its results once, as far as their layouts
are in HBM; a slice counts as what it takes of an array, an update as what it writes; what is aliased moves nothing.
"""

import re

from pivotjax.tpu.hlo import Computation, Instruction, Program

_MOVE_NOTHING = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "async-start async-update async-done opt-barrier iota".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(program: Program) -> float:
    """Of one device in one step."""
    return float(sum(
        times * of_instruction(program, program.computations[name], instruction)
        for name, times in program.runs.items() if name not in program.fused
        for instruction in program.computations[name].instructions.values()
    ))  # fmt: skip


def of_instruction(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Of one instruction, each time it runs."""
    opcode = instruction.opcode
    if opcode in _MOVE_NOTHING or opcode.endswith("-done"):
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode in _SLICES:
        return 2 * _hbm(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _hbm(operands[1])
    if opcode.endswith("-start"):  # its result names its operands too
        return _hbm(instruction)
    if opcode != "fusion":
        return _hbm(instruction) + sum(map(_hbm, operands))
    inside = program.computations[instruction.called[0]]
    outputs, inputs = _aliased(instruction)
    read = sum(_read(program, inside, number) for number in range(len(operands)) if number not in inputs)
    return read + _written(program, inside, outputs, instruction)


def _hbm(instruction: Instruction) -> int:
    return sum(a.bytes for a in instruction.arrays if a.space == 0)


def _aliased(fusion: Instruction) -> tuple[set[int], set[int]]:
    """Outputs of an asynchronous fusion that are its operands, and those operands."""
    if "async_collective_fusion" not in fusion.attributes:
        return set(), set()
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.attributes)
    return {int(out or 0) for out, _ in pairs}, {int(operand) for _, operand in pairs}


def _read(program: Program, inside: Computation, number: int) -> int:
    """What a fusion reads of one operand: only the slices, where nothing else is taken."""
    parameter = inside.parameter(number)
    if parameter is None or not _hbm(parameter):
        return 0
    taken = 0
    for user in inside.instructions.values():
        for place, name in enumerate(user.operands):
            if name != parameter.name or user.opcode == "parameter":
                continue
            if user.opcode in _SLICES and place == 0:
                taken += sum(a.bytes for a in user.arrays)
            elif user.opcode == "fusion":
                taken += _read(program, program.computations[user.called[0]], place)
            elif user.opcode == "bitcast" and _only_sliced(inside, user):
                taken += _sliced(inside, user)
            elif user.opcode != "dynamic-update-slice" or place != 0:
                return _hbm(parameter)
    return min(taken, _hbm(parameter))


def _only_sliced(inside: Computation, view: Instruction) -> bool:
    users = [i for i in inside.instructions.values() if view.name in i.operands]
    return bool(users) and all(i.opcode in _SLICES for i in users)


def _sliced(inside: Computation, view: Instruction) -> int:
    return sum(a.bytes for i in inside.instructions.values() if view.name in i.operands for a in i.arrays)


def _written(program: Program, inside: Computation, aliased: set[int], fusion: Instruction) -> int:
    """What a fusion writes: an update in place is as large as what is new."""
    root = inside.result
    made = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(made) != len(fusion.arrays):
        return _hbm(fusion)
    return sum(
        _new(program, inside, one, array.bytes)
        for place, (one, array) in enumerate(zip(made, fusion.arrays))
        if array.space == 0 and place not in aliased
    )


def _new(program: Program, inside: Computation, made: Instruction, whole: int) -> int:
    while made.opcode in ("bitcast", "copy"):
        made = inside.instructions[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in inside.instructions[made.operands[1]].arrays)
    if made.opcode == "fusion" and len(made.arrays) == 1:
        inner = program.computations[made.called[0]]
        return _new(program, inner, inner.result, whole)
    return whole
