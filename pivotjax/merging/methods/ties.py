"""TIES: trim, elect signs, merge what agrees."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.merging.elementwise import ELECTED_LAWS, by_expert, cuts, each, fuse, kept, rescaled, sizes
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import ExpertValues, Fraction, Merged, method
from pivotjax.merging.updates import Array, Updates


@method(
    "ties",
    family="elementwise",
    source="trim to the top share by magnitude, elect the sign of the sum, mean of agreeing entries (arXiv 2306.01708)",
    needs=("base",),
    scope="tensor",
    laws=ELECTED_LAWS,
)
def ties(
    updates: Updates,
    *,
    density: Fraction | ExpertValues = 0.2,
    scale: float = 1.0,
    weights: ExpertValues | None = None,
    normalize: bool = True,
    rescale: Literal["none", "norm"] = "none",
) -> Merged:
    """Trimmed updates whose signs agree, averaged.

    Each expert's update is trimmed tensor by tensor (as mergekit does; the authors' code trims all tensors of an
    expert together, which here would mostly compare one layer's scale with another's).

    Args:
        updates: K experts measured from their base.
        density: share of each tensor's entries that is kept, one for all experts or one each; at least one entry
            is kept (none at a density of 0), and entries as large as the smallest kept one are kept too.
        scale: lambda, on the merged update.
        weights: a factor for each expert by name, applied before the election; None: 1 each. Where the weighted sum
            is exactly 0 no sign is elected and the entry is 0.
        normalize: True: weighted mean of the agreeing entries; False: their weighted sum.
        rescale: `norm`: each trimmed tensor gets back the sum of magnitudes it had; `none`: it does not.
    """
    shares = by_expert(updates, density)
    smallest = cuts(updates, [[[kept(share, size)] for share in shares] for size in sizes(updates.layout)])
    weight = expert_weights(updates, weights, normalize=False)
    return Merged(_ties(updates, smallest, weight, scale, normalize, rescale))


@partial(jax.jit, static_argnums=(4, 5))
def _ties(updates: Updates, smallest: list[list[Array]], weight: Array, scale: float, normalize: bool, rescale: str):
    def trimmed(update: Array, cut: Array) -> Array:
        return rescaled(update, jnp.abs(update) >= cut[0], 1, rescale)

    return [scale * fuse(list(map(trimmed, leaf, leaf_cuts)), weight, elect=True, normalize=normalize)
            for leaf, leaf_cuts in zip(each(updates), smallest)]
