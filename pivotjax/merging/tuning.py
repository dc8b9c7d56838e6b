"""Choosing a method's options on calibration data: candidates are merged, stacked and measured together."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging.calibration import Calibration

PyTree = Any
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)
_STACK_BYTES = 2**30  # candidates that are in memory together
_STACK = 64


class Trial(NamedTuple):
    """A candidate's options (those that were varied) and its calibration loss; NaN or infinity where it has none."""

    options: dict[str, Any]
    loss: float


class Tuned(NamedTuple):
    """The scales tried, the calibration loss of each, and the best scale."""

    values: list[float]
    loss: list[float]
    best: float


def sweep(
    base: PyTree | None,
    merge_at: Callable[[dict[str, Any]], PyTree],
    axes: Mapping[str, Sequence[Any]],
    calibration: Calibration,
) -> list[Trial]:
    """The calibration loss at every combination of the axes' values.

    Every method's result is affine in its `scale` (base + scale * update; the laws' tests hold them to it), so one
    merge at scale 1 serves all scales. Candidates are measured as one stack, in parts that fit into 1 GB.

    Args:
        base: the parameters that updates are measured from; needed where `scale` is an axis.
        merge_at: merges at these options (one value of every axis; scale 1 where it is an axis) and returns parameters.
        axes: option -> values.
        calibration: whose `loss` decides.

    Returns:
        The trials, the last axis varying fastest.
    """
    if "scale" in axes and base is None:
        raise InputError("scale is a factor on what was learnt since the base: give a base, or leave scale out")
    if not all(axes.values()):
        raise InputError(f"no values to try for {next(option for option, values in axes.items() if not values)!r}")
    order = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    found: list[Trial] = []
    for part in _in_parts(_candidates(base, merge_at, axes)):
        options, params = zip(*part)
        found += map(Trial, options, losses(params, calibration))
    # Candidates come one merge after another, whichever axis `scale` is.
    return sorted(found, key=lambda trial: order.index(trial.options))


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest loss, the first of equal ones; InputError if none is finite."""
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    if not finite:
        raise InputError(f"none of {len(trials)} candidates has a finite calibration loss; try other values")
    return min(finite, key=lambda trial: trial.loss)


def tune_scale(
    base: PyTree, merged_at_one: PyTree, calibration: Calibration, values: Sequence[float] = SCALES
) -> Tuned:
    """The scale with the lowest calibration loss, from one merge at scale 1."""
    trials = sweep(base, lambda _: merged_at_one, {"scale": list(values)}, calibration)
    return Tuned([float(v) for v in values], [trial.loss for trial in trials], float(best(trials).options["scale"]))


def losses(params: Sequence[PyTree], calibration: Calibration) -> list[float]:
    """Calibration loss of several parameters, measured as one stack."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return [float(str(loss)) for loss in np.asarray(calibration.loss(stacked))]  # short decimals, as people write them


def _candidates(
    base: PyTree | None, merge_at: Callable[[dict[str, Any]], PyTree], axes: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], PyTree]]:
    """Options and parameters of every candidate, one merge for all scales."""
    others = {option: values for option, values in axes.items() if option != "scale"}
    for values in itertools.product(*others.values()):
        options = dict(zip(others, values))
        if "scale" not in axes:
            yield options, merge_at(options)
            continue
        at_one = merge_at({**options, "scale": 1.0})
        for scale in axes["scale"]:
            chosen = {option: scale if option == "scale" else options[option] for option in axes}
            yield chosen, jax.tree.map(lambda b, m, s=scale: _wide(b) + s * (_wide(m) - _wide(b)), base, at_one)


def _wide(leaf: Any) -> jax.Array:
    """Half precision would round the small differences between scales away."""
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _in_parts(candidates: Iterable[tuple[dict[str, Any], PyTree]]) -> Iterator[list[tuple[dict[str, Any], PyTree]]]:
    """Candidates in lists that may be stacked."""
    candidates = iter(candidates)
    for first in candidates:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(first[1]))
        count = max(1, min(_STACK, _STACK_BYTES // size))
        yield [first, *itertools.islice(candidates, count - 1)]
