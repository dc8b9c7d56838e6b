"""The plain (or weighted) average of the experts."""

import jax
import jax.numpy as jnp

from pivotjax.merging.registry import ExpertValues, Merged, method
from pivotjax.merging.updates import Updates


@method(
    "average",
    family="elementwise",
    source="W = sum_k w_k W_k, weights summing to 1 (model soups, arXiv 2203.05482; mergekit: linear)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "average": {}, "single": {}, "zero": {}},
)
def average(updates: Updates, *, weights: ExpertValues | None = None) -> Merged:
    """Mean of the experts' weights.

    Args:
        updates: K experts; no base is needed.
        weights: each expert's share by name, divided by their sum; None: equal shares.
    """
    return Merged(weighted_sum(updates, expert_weights(updates, weights, normalize=True)))


def expert_weights(updates: Updates, weights: ExpertValues | None, normalize: bool) -> jax.Array:
    """`[K]` float32 weights in the experts' order; None: 1 each. `normalize` divides them by their sum."""
    values = jnp.array([1.0 if weights is None else weights[name] for name in updates.names])
    return values / values.sum() if normalize else values


@jax.jit
def weighted_sum(updates: Updates, weights: jax.Array) -> list[jax.Array]:
    """`sum_k weights[k] D_k` for every leaf."""
    # A sum of products, not a matrix product: XLA then reads each expert once and stacks nothing.
    return [sum(w * d for w, d in zip(weights.astype(leaf.dtype), leaf)) for leaf in updates.stacked]
