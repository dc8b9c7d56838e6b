"""DARE: drop entries of the updates at random and rescale the rest, before task arithmetic or before TIES' election."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pivotjax.merging.elementwise import ELECTED_LAWS, LINEAR_LAWS, Rescale, by_expert, each, fuse, rescaled
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.randomness import Seed, keys, uniform
from pivotjax.merging.registry import ExpertValues, Fraction, Merged, method
from pivotjax.merging.updates import Array, Updates

_SOURCE = "keep each entry of D_k with probability density, divide it by density"


@method(
    "dare_linear",
    family="elementwise",
    source=f"{_SOURCE}; W0 + scale * sum_k w_k D~_k (arXiv 2311.03099)",
    needs=("base", "randomness"),
    scope="tensor",
    laws=LINEAR_LAWS,
)
def dare_linear(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.5,
    rescale: Rescale = "expected",
    scale: float = 0.3,
    weights: ExpertValues | None = None,
    normalize: bool = False,
    seed: Seed = 0,
) -> Merged:
    """Task arithmetic on randomly thinned, rescaled updates.

    Args:
        updates: K experts measured from their base.
        density: 1 - p, the probability with which an entry is kept, one for all experts or one each.
        rescale: what the kept entries are multiplied by. `expected`: 1 / density, so that the expectation is the update
            itself (the paper); `norm`: what restores the sum of magnitudes of each tensor (mergekit), 1 where nothing
            is kept; `none`: nothing.
        scale: lambda, on the sum of the thinned updates (task arithmetic's default).
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the weights by their sum.
        seed: the draws depend on it, on the expert's name and on the tensor's name alone.
    """
    return _merged(updates, density, rescale, scale, weights, seed, elect=False, normalize=normalize)


@method(
    "dare_ties",
    family="elementwise",
    source=f"{_SOURCE}; elect the sign of the sum, mean of agreeing entries (arXiv 2311.03099, 2306.01708)",
    needs=("base", "randomness"),
    scope="tensor",
    laws=ELECTED_LAWS,
)
def dare_ties(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.5,
    rescale: Rescale = "expected",
    scale: float = 1.0,
    weights: ExpertValues | None = None,
    normalize: bool = True,
    seed: Seed = 0,
) -> Merged:
    """TIES' election on randomly thinned, rescaled updates (which replaces its trimming).

    Args:
        updates: K experts measured from their base.
        density: 1 - p, the probability with which an entry is kept, one for all experts or one each.
        rescale: `expected`, `norm` or `none`, as in `dare_linear`.
        scale: lambda, on the merged update.
        weights: a factor for each expert by name, applied before the election; None: 1 each.
        normalize: True: weighted mean of the agreeing entries; False: their weighted sum (mergekit's default).
        seed: the draws depend on it, on the expert's name and on the tensor's name alone.
    """
    return _merged(updates, density, rescale, scale, weights, seed, elect=True, normalize=normalize)


def _merged(updates, density, rescale, scale, weights, seed, elect: bool, normalize: bool) -> Merged:
    shares = jnp.array([float(share) for share in by_expert(updates, density)])
    drawn = [keys(seed, updates.names, path) for path in updates.layout.paths]
    weight = expert_weights(updates, weights, normalize=False)
    return Merged(_dare(updates, drawn, shares, weight, scale, rescale, elect, normalize))


@partial(jax.jit, static_argnames=("rescale", "elect", "normalize"))
def _dare(
    updates: Updates, drawn: Sequence[Array], shares: Array, weight: Array, scale: float,
    rescale: Rescale, elect: bool, normalize: bool,
) -> list[Array]:
    merged = []
    for leaf, key in zip(each(updates), drawn):
        thin = [rescaled(d, uniform(key[k], d.shape) < shares[k], shares[k], rescale) for k, d in enumerate(leaf)]
        merged.append(scale * fuse(thin, weight, elect, normalize))
    return merged
