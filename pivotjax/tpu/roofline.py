"""How fast a compiled step can be on a slice: an estimate from what the optimised program does and the chips' limits.

The roofline model (Williams et al. 2009): an operation takes the longer of its arithmetic at the peak rate and its
traffic at the memory's bandwidth. Collectives that run beside products cost what they take longer than those; the
others are added. Real kernels stay below these limits, so a run is slower than the estimate, never faster.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pivotjax.tpu import flops, traffic
from pivotjax.tpu.collectives import Collective
from pivotjax.tpu.hlo import Program
from pivotjax.tpu.topology import Slice


class Roofline(NamedTuple):
    """Estimates for one step.

    Fields:
        compute_seconds: its arithmetic at the chips' peak.
        hbm_seconds: its memory traffic at full bandwidth.
        ici_seconds: its collectives at the links' full rate ...
        ici_exposed_seconds: ... and those of them that nothing runs beside.
        step_seconds: the step: each operation at its own limit, and the collectives that are not hidden behind them.
        binds: what most of the step waits for: compute, hbm or ici.
        mfu: the analytic minimum of arithmetic over what the chips could do in `step_seconds`.
        samples_per_second: of all experts together.
        hours, chip_hours: of all steps of the recipe.
    """

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    ici_exposed_seconds: float
    step_seconds: float
    binds: str
    mfu: float
    samples_per_second: float
    hours: float
    chip_hours: float


def roofline(
    program: Program, found: Sequence[Collective], where: Slice, coordinates: np.ndarray, minimum: float, samples: int,
    steps: int, kernels: float = 0.0,
) -> Roofline:
    """The estimate.

    Args:
        found: the program's collectives.
        coordinates: of the mesh's devices in the slice, `[devices, dimensions]`.
        minimum: analytic minimum of FLOPs of a step, over all chips.
        samples: of a step, over all experts.
        steps: of the recipe.
        kernels: FLOPs of one device in custom kernels.
    """  # fmt: skip
    compute = (flops.executed(program).total + kernels) / where.peak_flops
    hbm = traffic.hbm_bytes(program) / (where.hbm_gbps * 1e9)
    busy = _busy_seconds(program, where) + kernels / where.peak_flops
    hidden, exposed = (
        sum(_seconds(one, where, coordinates) for one in found if one.overlapped is beside) for beside in (True, False)
    )
    step = max(busy, hidden) + exposed
    limits = {"compute": compute, "hbm": max(hbm, busy - compute), "ici": exposed + max(0.0, hidden - busy)}
    return Roofline(
        compute_seconds=compute,
        hbm_seconds=hbm,
        ici_seconds=hidden + exposed,
        ici_exposed_seconds=exposed,
        step_seconds=step,
        binds="ici" if hidden > busy else max(limits, key=limits.__getitem__),
        mfu=minimum / (step * where.peak_flops * where.chips),
        samples_per_second=samples / step,
        hours=steps * step / 3600,
        chip_hours=where.chips * steps * step / 3600,
    )


def _busy_seconds(program: Program, where: Slice) -> float:
    """All operations that are not asynchronous one after the other, each at its own limit."""
    total = 0.0
    for name, times in program.runs.items():
        if name in program.fused or name in program.started_by:
            continue
        for instruction in program.computations[name].instructions.values():
            arithmetic = _flops(program, name, instruction) / where.peak_flops
            moved = traffic.of_instruction(program, program.computations[name], instruction) / (where.hbm_gbps * 1e9)
            total += times * max(arithmetic, moved)
    return total


def _flops(program: Program, name: str, instruction: Any) -> int:
    """Of one operation, what is fused into it included."""
    own = flops.of_instruction(program.computations[name], instruction)
    if instruction.opcode != "fusion":
        return own
    return own + sum(_flops(program, inside, one) for inside in instruction.called
                     for one in program.computations[inside].instructions.values())  # fmt: skip


def _seconds(collective: Collective, where: Slice, coordinates: np.ndarray) -> float:
    return collective.sent / (_rate(collective.groups[0], where, coordinates) * 1e9)


def _rate(group: Sequence[int], where: Slice, coordinates: np.ndarray) -> float:
    """GB/s that each device of a group can send to the others of it.

    A device's links are shared evenly by the slice's dimensions, and a group uses those of the dimensions that it
    spreads over: both directions of a ring, one of a line.
    """
    places, extents = coordinates[list(group)], coordinates.max(axis=0) + 1
    rings = 0.0
    for dimension, wraps in enumerate(where.wraps):
        there = len(set(places[:, dimension]))
        if there > 1:
            rings += 1.0 if wraps and there == extents[dimension] else 0.5
    return where.ici_gbps * (rings or 0.5) / len(where.wraps)
