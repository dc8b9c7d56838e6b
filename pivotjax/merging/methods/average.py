"""The plain (or weighted) average of the experts."""

import jax
import jax.numpy as jnp

from pivotjax.errors import InputError
from pivotjax.merging.elementwise import each, weighted
from pivotjax.merging.registry import ExpertValues, Merged, method
from pivotjax.merging.updates import Updates


@method(
    "average",
    family="elementwise",
    source="W = sum_k w_k W_k (model soups, arXiv 2203.05482; mergekit: linear)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "average": {}, "single": {}, "zero": {}},
)
def average(updates: Updates, *, weights: ExpertValues | None = None, normalize: bool = True) -> Merged:
    """Mean of the experts' weights.

    Args:
        updates: K experts; no base is needed.
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the factors by their sum. False: `sum_k w_k W_k` as it stands, with a base or without.
    """
    weight = expert_weights(updates, weights, normalize)
    merged = weighted_sum(updates, weight)
    return Merged(merged if normalize else _from_base(updates, merged, weight))


def expert_weights(updates: Updates, weights: ExpertValues | None, normalize: bool) -> jax.Array:
    """`[K]` float32 weights in the experts' order; None: 1 each. `normalize` divides them by their sum."""
    values = [1.0 if weights is None else weights[name] for name in updates.names]
    if normalize and abs(sum(values)) < 1e-8:
        raise InputError("option 'weights': all values are 0, or they cancel; shares of their sum need another sum")
    return jnp.array(values) / (sum(values) if normalize else 1)


@jax.jit
def weighted_sum(updates: Updates, weights: jax.Array) -> list[jax.Array]:
    """`sum_k weights[k] D_k` for every leaf."""
    return [sum(weighted(leaf, weights)) for leaf in each(updates)]


@jax.jit
def _from_base(updates: Updates, merged: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """`sum_k w_k W_k - W0` of `sum_k w_k D_k`."""
    return [leaf + (weights.sum() - 1) * base for leaf, base in zip(merged, updates.base_leaves)]
