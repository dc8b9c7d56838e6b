"""TSV-Merge: the leading singular vectors of every expert, made orthogonal to each other."""

from functools import partial

import jax
import jax.numpy as jnp

from pivotjax.merging import spectral
from pivotjax.merging.methods.matrices import Facts, merge_kernels, merged, polars, side_by_side, single_rank
from pivotjax.merging.registry import Count, Merged, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Array, Updates


@method(
    "tsv_m",
    family="spectral",
    source="polar([U_1..U_K]) diag(S_1..S_K) polar([V_1..V_K])', U_k S_k V_k' the leading min(m, n) / K singular "
    "triplets of D_k (TSV-M, arXiv 2412.00081)",
    needs=("base",),
    laws={"order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def tsv_m(updates: Updates, *, rank: Count | None = None, scale: float = 1.0) -> Merged:
    """Concatenates the experts' leading singular triplets and decorrelates the vectors (whitening by a polar factor).

    Vectors (biases too) are averaged. Directions of singular value 0 take no part, so that an update of lower rank
    does not fill its share with arbitrary ones; linearly dependent directions of different experts share a
    direction of the merge (the polar factor is a partial isometry): identical experts give D cut to its leading
    min(m, n) / K directions. One expert alone is returned.

    Args:
        updates: K experts measured from their base.
        rank: triplets an expert; None: min(m, n) / K rounded down, at least 1 (the paper's).
        scale: alpha, on the merged update; the paper's is 1.
    """
    return merged(updates, *_tsv_m(updates, scale, rank))


@partial(jax.jit, static_argnums=2)
def _tsv_m(updates: Updates, scale: float, rank: int | None) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        u, sigma, v = leading_triplets(update, rank or single_rank(update.shape, len(update)))
        left, right = polars(side_by_side(u), side_by_side(v))
        sigma = side_by_side(sigma[..., None, :])
        return matmul(left * sigma, transpose(right)), {"directions": (sigma > 0).sum((-1, -2))}

    return merge_kernels(updates, one, scale)


def leading_triplets(update: Array, rank: int, floor: Array | float = 0.0) -> tuple[Array, Array, Array]:
    """`spectral.svd` of each expert's update `[K, n, m, n']`; where sigma is not above `floor` (`[K, n]`) it is 0, and
    the vectors are 0 on both sides."""
    u, sigma, v = jax.lax.map(partial(spectral.svd, rank=rank), update)
    alive = sigma > jnp.asarray(floor, sigma.dtype)[..., None]
    return u * alive[..., None, :], jnp.where(alive, sigma, 0), v * alive[..., None, :]
