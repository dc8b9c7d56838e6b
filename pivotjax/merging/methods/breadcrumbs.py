"""Model Breadcrumbs: drop the outliers and the small tail of each update."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.merging.elementwise import ELECTED_LAWS, LINEAR_LAWS, by_expert, cuts, each, fuse, rescaled, sizes
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import ExpertValues, Fraction, Merged, Share, method
from pivotjax.merging.updates import Array, Updates

Rescale = Literal["none", "norm"]
_SOURCE = "drop the top share gamma of D_k by magnitude, of the rest keep the largest share density of all"


@method(
    "breadcrumbs",
    family="elementwise",
    source=f"{_SOURCE}; W0 + scale * sum_k w_k D~_k (arXiv 2312.06795)",
    needs=("base",),
    scope="tensor",
    laws=LINEAR_LAWS,
)
def breadcrumbs(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.9,
    gamma: Share | ExpertValues = 0.01,
    scale: float = 0.3,
    weights: ExpertValues | None = None,
    normalize: bool = False,
    rescale: Rescale = "none",
) -> Merged:
    """Task arithmetic on updates without their largest and smallest entries, tensor by tensor.

    Of a tensor's n entries `int(density n)` are kept: those below the `int(gamma n)` largest, or the smallest of all
    where density and gamma together exceed 1 (at density 1 all). An entry as large as a kept one is kept too; where
    `density n < 1` the tensor keeps nothing.

    Args:
        updates: K experts measured from their base.
        density: share of the entries that is kept, one for all experts or one each.
        gamma: share of the entries that is dropped as outliers, one for all experts or one each.
        scale: lambda, on the sum (the paper's .3 for any number of experts).
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the weights by their sum.
        rescale: `norm`: each thinned tensor gets back the sum of magnitudes it had; `none`: it does not.
    """
    return _merged(updates, density, gamma, scale, weights, rescale, elect=False, normalize=normalize)


@method(
    "breadcrumbs_ties",
    family="elementwise",
    source=f"{_SOURCE}; elect the sign of the sum, mean of agreeing entries (arXiv 2312.06795, 2306.01708)",
    needs=("base",),
    scope="tensor",
    laws=ELECTED_LAWS,
)
def breadcrumbs_ties(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.9,
    gamma: Share | ExpertValues = 0.01,
    scale: float = 1.0,
    weights: ExpertValues | None = None,
    normalize: bool = True,
    rescale: Rescale = "none",
) -> Merged:
    """TIES' election on updates without their largest and smallest entries.

    Which entries are kept, and the special cases, are those of `breadcrumbs`.

    Args:
        updates: K experts measured from their base.
        density: share of the entries that is kept, one for all experts or one each.
        gamma: share of the entries that is dropped as outliers, one for all experts or one each.
        scale: lambda, on the merged update.
        weights: a factor for each expert by name, applied before the election; None: 1 each.
        normalize: True: weighted mean of the agreeing entries; False: their weighted sum (mergekit's default).
        rescale: `norm` or `none`, as in `breadcrumbs`.
    """
    return _merged(updates, density, gamma, scale, weights, rescale, elect=True, normalize=normalize)


def _merged(updates, density, gamma, scale, weights, rescale, elect: bool, normalize: bool) -> Merged:
    shares = list(zip(by_expert(updates, density), by_expert(updates, gamma)))
    windows = cuts(updates, [[_ranks(size, *share) for share in shares] for size in sizes(updates.layout)])
    weight = expert_weights(updates, weights, normalize=False)
    return Merged(_breadcrumbs(updates, windows, weight, scale, rescale, elect, normalize))


def _ranks(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Ranks (1 is the largest entry) of the smallest and the largest kept entry; (0, 1) where none is."""
    target = min(size, int(max(density, 0) * size))
    dropped = min(int(gamma * size), size - target)
    return (dropped + target, dropped + 1) if target else (0, 1)


@partial(jax.jit, static_argnames=("rescale", "elect", "normalize"))
def _breadcrumbs(
    updates: Updates, windows: list[list[Array]], weight: Array, scale: float,
    rescale: Rescale, elect: bool, normalize: bool,
) -> list[Array]:
    def thin(update: Array, ends: Array) -> Array:
        size = jnp.abs(update)
        return rescaled(update, (size >= ends[0]) & (size <= ends[1]), 1, rescale)

    return [scale * fuse(list(map(thin, leaf, window)), weight, elect, normalize)
            for leaf, window in zip(each(updates), windows)]
