"""DC-Merge: TIES on a few entries in the bases that cover all experts' leading directions."""

from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging.methods.matrices import Facts, elected, merge_kernels, merged, polars, side_by_side, single_rank
from pivotjax.merging.methods.tsv_m import leading_triplets
from pivotjax.merging.registry import Bounds, Count, Fraction, Merged, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Array, Updates

Ratio = Annotated[float, Bounds(1)]


@method(
    "dc_merge",
    family="spectral",
    source="U~ (mask * TIES_k(top(U~' U_k S_k V_k' V~))) V~', U~ = polar([U_1..U_K]), V~ likewise, mask: K diagonal "
    "blocks, U_k S_k V_k' the leading min(m, n) / K triplets of D_k (DC-Merge, arXiv 2603.06242, as released)",
    needs=("base",),
    laws={"order": {}, "homogeneous": {}, "zero": {}, "single": {"density": 1.0}},
)
def dc_merge(
    updates: Updates,
    *,
    density: Fraction = 0.001,
    smoothing: Literal["none", "average", "linear"] = "none",
    ratio: Ratio = 5.0,
    rank: Count | None = None,
    scale: float = 1.0,
) -> Merged:
    """Projects truncated updates into common orthogonal bases and merges their strongest entries there.

    Vectors (biases too) are averaged. Directions of singular value 0 take no part, as in `tsv_m`. One expert is
    trimmed too: it is returned at density 1.

    Args:
        updates: K experts measured from their base.
        density: share of an expert's entries in the common bases that is kept, by magnitude, at least one; entries as
            large as the smallest kept one (to 1e-4 of it) are kept too. .001 as in the authors' code. The signs of
            the sum are elected and the mean of the agreeing entries taken.
        smoothing: of each expert's kept singular values, their sum unchanged: `none`, the authors' choice for full
            fine-tuning; `average`, all equal; `linear`, falling in equal steps.
        ratio: largest to smallest singular value of `linear`, where the update's own is not smaller; the authors' is 5.
        rank: triplets an expert; None: min(m, n) / K rounded down, at least 1 (the authors').
        scale: on the merged update; the authors tune it.
    """
    return merged(updates, *_dc_merge(updates, scale, ratio, density, smoothing, rank))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _dc_merge(
    updates: Updates, scale: float, ratio: float, density: float, smoothing: str, rank: int | None
) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        share = rank or single_rank(update.shape, len(update))
        u, sigma, v = leading_triplets(update, share)
        left, right = polars(side_by_side(u), side_by_side(v))
        sigma = _smoothed(sigma, smoothing, ratio)
        inside = jax.lax.map(
            lambda k: matmul(matmul(transpose(left), k[0]) * k[1][..., None, :], matmul(transpose(k[2]), right)),
            (u, sigma, v),
        )  # [K, n, K r, K r]
        mean, kept = elected(inside, max(1, int(density * inside[0, 0].size + 1e-6)))
        expert = np.arange(len(update)).repeat(share)
        own_block = jnp.where(expert[:, None] == expert, mean, 0)
        return matmul(matmul(left, own_block), transpose(right)), {"entries_kept": kept}

    return merge_kernels(updates, one, scale)


def _smoothed(sigma: Array, smoothing: str, ratio: float) -> Array:
    """`[..., r]` singular values, descending, redistributed; zeros stay zero."""
    alive = sigma > 0
    count = alive.sum(-1, keepdims=True)
    if smoothing == "none":
        return sigma
    shape = alive.astype(sigma.dtype)
    if smoothing == "linear":
        last = jnp.where(alive, sigma, jnp.inf).min(-1, keepdims=True)
        own = jnp.minimum(ratio, sigma[..., :1] / last)
        steps = jnp.arange(sigma.shape[-1]) / jnp.maximum(count - 1, 1)
        shape = jnp.where(alive, own + (1 - own) * steps, 0)
    return sigma.sum(-1, keepdims=True) * shape / jnp.maximum(shape.sum(-1, keepdims=True), 1)

