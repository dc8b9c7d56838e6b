"""MetaGPT: task arithmetic with coefficients in closed form."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.merging.diagnostics import by_expert
from pivotjax.merging.elementwise import by_layer, divide, each, total, weighted
from pivotjax.merging.registry import Merged, method
from pivotjax.merging.updates import Array, Updates


@method(
    "metagpt",
    family="elementwise",
    source="W0 + sum_k lambda_k D_k, lambda_k = |D_k|^2 / sum_j |D_j|^2 (arXiv 2406.11385)",
    needs=("base",),
    scope=lambda options: options["over"],
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}, "idle": {}},
)
def metagpt(updates: Updates, *, over: Literal["model", "tensor"] = "model", scale: float = 1.0) -> Merged:
    """The mean of the updates, each weighted by its energy.

    The coefficients minimise a bound on the mean loss of the tasks where the loss is locally linear and the updates are
    orthogonal. Where all updates are 0 so is the merged one.

    Args:
        updates: K experts measured from their base.
        over: whose norms: one coefficient an expert from the norms of its whole update (the paper), or one for each
            tensor (ours).
        scale: factor on the merged update.
    """
    leaves, coefficients = _metagpt(updates, scale, over)
    return Merged(leaves, by_layer(updates.layout, [{"weights": by_expert(updates, c)} for c in coefficients]))


@partial(jax.jit, static_argnums=2)
def _metagpt(updates: Updates, scale: float, over: str) -> tuple[list[Array], list[Array]]:
    leaves = each(updates)
    energies = [jnp.stack([total(jnp.square(d)) for d in leaf]) for leaf in leaves]
    if over == "model":
        energies = [sum(energies)] * len(energies)
    coefficients = [divide(energy, energy.sum()) for energy in energies]
    return [scale * sum(weighted(leaf, c)) for leaf, c in zip(leaves, coefficients)], coefficients
