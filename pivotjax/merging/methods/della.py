"""DELLA: like DARE, but small entries are dropped more often than large ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pivotjax.merging.elementwise import (
    ELECTED_LAWS,
    LINEAR_LAWS,
    Rescale,
    by_expert,
    each,
    fuse,
    input_axes,
    rescaled,
    update_of,
    vectors,
)
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.randomness import Seed, keys, uniform
from pivotjax.merging.registry import ExpertValues, Fraction, Merged, Share, method
from pivotjax.merging.updates import Array, Updates

_SOURCE = "MagPrune: keep-probability density - epsilon ... density + epsilon by rank in an output's row, divide by it"


@method(
    "della_linear",
    family="elementwise",
    source=f"{_SOURCE}; W0 + scale * sum_k w_k D~_k (arXiv 2406.11617)",
    needs=("base", "randomness"),
    scope="tensor",
    laws=LINEAR_LAWS,
)
def della_linear(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.7,
    epsilon: Share | ExpertValues = 0.15,
    rescale: Rescale = "expected",
    scale: float = 0.3,
    weights: ExpertValues | None = None,
    normalize: bool = False,
    seed: Seed = 0,
) -> Merged:
    """Task arithmetic on updates thinned by magnitude, at random.

    Of n entries that feed one output, ranked by magnitude 0 (smallest) to n - 1, the one of rank r is kept with
    probability `p_r = density - e + 2 e r / (n - 1)`, `e = min(epsilon, density, 1 - density)`: their mean is the
    density, and at density 1 all are kept. Equal entries share the lowest of their ranks; a row of one entry has
    `p = density`. A 1-D tensor is ranked as one row.

    Args:
        updates: K experts measured from their base.
        density: mean probability with which an entry is kept, one for all experts or one each.
        epsilon: half the range of the probabilities, one for all experts or one each.
        rescale: `expected`: kept entries are divided by their own p (the paper); `norm`: by what restores the tensor's
            sum of magnitudes (mergekit); `none`.
        scale: lambda, on the sum of the thinned updates (task arithmetic's default).
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the weights by their sum.
        seed: the draws depend on it, on the expert's name and on the tensor's name alone.
    """
    return _merged(updates, density, epsilon, rescale, scale, weights, seed, elect=False, normalize=normalize)


@method(
    "della",
    family="elementwise",
    source=f"{_SOURCE}; elect the sign of the sum, mean of agreeing entries (arXiv 2406.11617)",
    needs=("base", "randomness"),
    scope="tensor",
    laws=ELECTED_LAWS,
)
def della(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.7,
    epsilon: Share | ExpertValues = 0.15,
    rescale: Rescale = "expected",
    scale: float = 1.0,
    weights: ExpertValues | None = None,
    normalize: bool = True,
    seed: Seed = 0,
) -> Merged:
    """Drop, elect, fuse: TIES' election on updates thinned by magnitude, at random.

    Ranks, probabilities and special cases are those of `della_linear`.

    Args:
        updates: K experts measured from their base.
        density: mean probability with which an entry is kept, one for all experts or one each.
        epsilon: half the range of the probabilities, one for all experts or one each.
        rescale: `expected`, `norm` or `none`, as in `della_linear`.
        scale: lambda, on the merged update.
        weights: a factor for each expert by name, applied before the election; None: 1 each.
        normalize: True: weighted mean of the agreeing entries; False: their weighted sum.
        seed: the draws depend on it, on the expert's name and on the tensor's name alone.
    """
    return _merged(updates, density, epsilon, rescale, scale, weights, seed, elect=True, normalize=normalize)


def _merged(updates, density, epsilon, rescale, scale, weights, seed, elect: bool, normalize: bool) -> Merged:
    shares = [min(max(share, 0.0), 1.0) for share in by_expert(updates, density)]
    spreads = [min(spread, share, 1 - share) for spread, share in zip(by_expert(updates, epsilon), shares)]
    axes = input_axes(updates.layout)
    bases = updates.base or [None] * len(axes)
    ranked = [[_ranks(leaf[k], base, axis, updates.dtype) for k in range(len(shares))]
              for leaf, base, axis in zip(updates.experts, bases, axes)]
    drawn = [keys(seed, updates.names, path) for path in updates.layout.paths]
    weight = expert_weights(updates, weights, normalize=False)
    leaves = _della(updates, ranked, drawn, jnp.array(shares), jnp.array(spreads), weight, scale,
                    rescale, elect, normalize)
    return Merged(leaves, exceptions=dict.fromkeys(vectors(updates.layout), "ranked as one row: not a matrix"))


@partial(jax.jit, static_argnames=("rescale", "elect", "normalize"))
def _della(
    updates: Updates, ranked: Sequence[Sequence[Array]], drawn: Sequence[Array], shares: Array, spreads: Array,
    weight: Array, scale: float, rescale: Rescale, elect: bool, normalize: bool,
) -> list[Array]:
    merged = []
    for leaf, ranks, key, axis in zip(each(updates), ranked, drawn, input_axes(updates.layout)):
        thin = []
        for k, (update, rank) in enumerate(zip(leaf, ranks)):
            last = update.shape[axis] - 1 if update.ndim else 0
            position = rank.astype(update.dtype) / last if last else jnp.full(update.shape, 0.5, update.dtype)
            probability = (shares[k] - spreads[k]) + position * (2 * spreads[k])
            kept = uniform(key[k], update.shape) < probability
            thin.append(rescaled(update, kept, probability, rescale))
        merged.append(scale * fuse(thin, weight, elect, normalize))
    return merged


@partial(jax.jit, static_argnums=(2, 3))
def _ranks(expert: Array, base: Array | None, axis: int, dtype: Any) -> Array:
    """Ranks by magnitude along `axis`, 0 for the smallest, of one expert's update; 16-bit where they fit.

    Sorted as integers (XLA sorts floats several times slower), then each entry finds its place by binary search: XLA's
    sort of values with their indices costs more than both.
    """
    if expert.ndim == 0:
        return jnp.zeros((), jnp.uint16)
    size = jnp.abs(update_of(expert, base, dtype)).swapaxes(axis, -1)
    bits = jax.lax.bitcast_convert_type(size, f"int{8 * size.dtype.itemsize}").reshape(-1, size.shape[-1])
    rows, count = bits.shape
    ordered = jnp.sort(bits, axis=-1).ravel()
    start = jnp.arange(rows, dtype=jnp.int32)[:, None] * count
    steps = count.bit_length()

    def narrow(i: int, below: Array) -> Array:
        """`below`: so many entries of the row are known to be smaller."""
        further = below + (jnp.int32(1) << (steps - 1 - i))
        probe = ordered.at[start + jnp.minimum(further, count) - 1].get(mode="promise_in_bounds")
        return jnp.where((further <= count) & (probe < bits), further, below)

    ranks = jax.lax.fori_loop(0, steps, narrow, jnp.zeros(bits.shape, jnp.int32))
    return ranks.astype(jnp.uint16 if count <= 2**16 else jnp.int32).reshape(size.shape).swapaxes(axis, -1)
