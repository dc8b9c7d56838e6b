"""TIES: trim, elect signs, merge what agrees."""

import math

import jax
import jax.numpy as jnp

from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import ExpertValues, Fraction, Merged, method
from pivotjax.merging.updates import Updates


@method(
    "ties",
    family="elementwise",
    source="trim to the top share by magnitude, elect the sign of the sum, mean of agreeing entries (arXiv 2306.01708)",
    needs=("base",),
    scope="tensor",
    laws={
        "identical": {"density": 1.0},
        "order": {},
        "homogeneous": {},
        "single": {"density": 1.0},
        "zero": {},
        "idle": {},
    },
)
def ties(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.2,
    scale: float = 1.0,
    weights: ExpertValues | None = None,
    normalize: bool = True,
) -> Merged:
    """Trimmed updates whose signs agree, averaged.

    Each expert's update is trimmed tensor by tensor (as mergekit does; the authors' code trims all tensors of an
    expert together, which here would mostly compare one layer's scale with another's).

    Args:
        updates: K experts measured from their base.
        density: share of each tensor's entries that is kept, one for all experts or one each; at least one entry
            is kept, and entries as large as the smallest kept one are kept too.
        scale: lambda, on the merged update.
        weights: a factor for each expert by name, applied before the election; None: 1 each.
        normalize: True: weighted mean of the agreeing entries; False: their weighted sum.
    """
    densities = [density[name] if isinstance(density, dict) else density for name in updates.names]
    kept = [jnp.array([_kept(share, math.prod(shape)) for share in densities]) for shape in updates.layout.shapes]
    weight = expert_weights(updates, weights, normalize=False)
    return Merged(_ties(updates, kept, weight, scale, normalize))


def _kept(share: float, size: int) -> int:
    return min(size, max(1, math.floor(share * size + 1e-6)))


@jax.jit
def _ties(updates: Updates, kept: list[jax.Array], weight: jax.Array, scale: float, normalize: bool):
    return [scale * _ties_leaf(leaf, keep, weight, normalize) for leaf, keep in zip(updates.stacked, kept)]


def _ties_leaf(leaf: jax.Array, kept: jax.Array, weight: jax.Array, normalize: bool) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    size = jnp.abs(flat)
    threshold = jax.vmap(_largest)(size, kept)[:, None]
    trimmed = weight[:, None] * jnp.where(size >= threshold, flat, 0)
    agrees = (trimmed != 0) & (jnp.sign(trimmed) == jnp.sign(trimmed.sum(0)))
    total = jnp.where(agrees, trimmed, 0).sum(0)
    share = jnp.where(agrees, weight[:, None], 0).sum(0)
    mean = total / jnp.where(share > 0, share, 1)
    return jnp.where(normalize, mean, total).reshape(leaf.shape[1:])


def _largest(values: jax.Array, count: jax.Array) -> jax.Array:
    """The `count`-th largest of `values` [N], all at least 0, by bisection on their bits (they order as integers):
    exact, and much cheaper than a sort."""
    bits = jax.lax.bitcast_convert_type(values, f"int{8 * values.dtype.itemsize}")

    def halve(step: int, low: jax.Array) -> jax.Array:
        middle = low | (jnp.ones_like(low) << (8 * values.dtype.itemsize - 2 - step))
        return jnp.where((bits >= middle).sum() >= count, middle, low)

    low = jax.lax.fori_loop(0, 8 * values.dtype.itemsize - 1, halve, jnp.zeros((), bits.dtype))
    return jax.lax.bitcast_convert_type(low, values.dtype)
