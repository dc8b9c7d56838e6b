"""Model Stock: how far to go from the base to the experts' mean, from the angles between the updates."""

from functools import partial

import jax
import jax.numpy as jnp

from pivotjax.merging.elementwise import by_layer, divide, each, input_axes, total, vectors
from pivotjax.merging.registry import Merged, NotNegative, method
from pivotjax.merging.updates import Array, Updates


@method(
    "model_stock",
    family="spherical",
    source="W0 + t * mean_k D_k, t = K c / (1 + (K - 1) c), c the mean cosine of two updates (arXiv 2403.19522)",
    needs=("base",),
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def model_stock(
    updates: Updates, *, filter_wise: bool = False, floor: NotNegative = 0.0, scale: float = 1.0
) -> Merged:
    """The mean update, shortened by how little the experts agree, tensor by tensor.

    Unrelated updates (c = 0) give the base, identical ones (c = 1) their mean. Where `1 + (K - 1) c` is 0 (within 1e-6)
    there is no finite t and the base is kept. One expert has no pair to take an angle of and is returned (t = 1).

    Args:
        updates: K experts measured from their base.
        filter_wise: an angle and a t for each output (row) of a matrix instead of one for each tensor; a 1-D tensor has
            one either way.
        floor: least product of two norms by which an inner product is divided. mergekit has 1e-6, which pulls tensors
            with tiny updates towards the base; 0: none (the cosine with an update of 0 is 0).
        scale: lambda, on the merged update.
    """
    leaves, factors = _model_stock(updates, floor, scale, filter_wise)
    facts = by_layer(updates.layout, [{"interpolation": t.mean()} for t in factors])
    paths = updates.layout.paths
    if len(updates.names) == 1:
        return Merged(leaves, facts, exceptions=dict.fromkeys(paths, "returned as it is: one expert has no pair"))
    flat = vectors(updates.layout) if filter_wise else []
    return Merged(leaves, facts, exceptions=dict.fromkeys(flat, "one angle for the whole tensor: not a matrix"))


@partial(jax.jit, static_argnums=3)
def _model_stock(updates: Updates, floor: float, scale: float, filter_wise: bool) -> tuple[list[Array], list[Array]]:
    leaves, factors = [], []
    for leaf, axis in zip(each(updates), input_axes(updates.layout)):
        rows = filter_wise and leaf[0].ndim > 1
        factor = _factor(leaf, axis if rows else None, floor)
        leaves.append(scale * factor * (sum(leaf) / len(leaf)))
        factors.append(factor)
    return leaves, factors


def _factor(leaf: list[Array], axis: int | None, floor: float) -> Array:
    """t of one tensor, a scalar; or of each of its rows, which lie along `axis`."""

    def inner(a: Array, b: Array) -> Array:
        return total(a * b) if axis is None else (a * b).sum(axis, keepdims=True)

    count = len(leaf)
    if count == 1:
        return jnp.ones((), leaf[0].dtype)
    norms = [jnp.sqrt(inner(d, d)) for d in leaf]
    pairs = [(j, k) for j in range(count) for k in range(j + 1, count)]
    cosines = [divide(inner(leaf[j], leaf[k]), jnp.maximum(norms[j] * norms[k], floor)) for j, k in pairs]
    cosine = sum(jnp.clip(c, -1, 1) for c in cosines) / len(pairs)
    below = 1 + (count - 1) * cosine
    return jnp.where(jnp.abs(below) < 1e-6, 0, divide(count * cosine, below))
