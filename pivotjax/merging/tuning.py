"""Choosing a merge's scale on calibration data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging.calibration import Calibration

PyTree = Any
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)


class Tuned(NamedTuple):
    """The scales tried, the calibration loss of each, and the best scale."""

    values: list[float]
    loss: list[float]
    best: float


def tune_scale(
    base: PyTree, merged_at_one: PyTree, calibration: Calibration, values: Sequence[float] = SCALES
) -> Tuned:
    """The scale with the lowest calibration loss.

    Every method's result is affine in its `scale` (base + scale * update; the laws' tests hold them to it), so one
    merge at scale 1 gives all candidates, and they are measured as one stack.
    """
    candidates = jax.tree.map(lambda b, m: jnp.stack([b + v * (m - b) for v in values]), base, merged_at_one)
    losses = np.asarray(calibration.loss(candidates), np.float64)
    finite = np.where(np.isfinite(losses), losses, np.inf)
    return Tuned([float(v) for v in values], losses.tolist(), float(values[int(np.argmin(finite))]))
