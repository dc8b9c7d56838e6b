"""Isotropic merging: the directions of the sum, all equally strong."""

from functools import partial

import jax
import jax.numpy as jnp

from pivotjax.merging import spectral
from pivotjax.merging.methods.matrices import Facts, merge_kernels, merged, side_by_side
from pivotjax.merging.methods.tsv_m import leading_triplets
from pivotjax.merging.registry import Merged, Share, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Array, Updates


@method(
    "iso_c",
    family="spectral",
    source="mean(S) U V', U S V' = SVD(sum_k D_k) (Iso-C, arXiv 2502.04959)",
    needs=("base",),
    laws={"order": {}, "homogeneous": {}, "zero": {}},
)
def iso_c(updates: Updates, *, scale: float = 1.0) -> Merged:
    """The sum of the updates with all singular values set to their mean.

    Computed as the polar factor P of the sum times `<P, sum> / min(m, n)`, without singular directions. Vectors
    (biases too) are averaged. Directions in which the sum is 0 stay 0 (an SVD would fill them arbitrarily), and
    count in the mean. One expert is made isotropic too.

    Args:
        updates: K experts measured from their base.
        scale: alpha, on the merged update; the paper tunes it, 1 leaves the nuclear norm of the sum.
    """
    return merged(updates, *_iso_c(updates, scale))


@jax.jit
def _iso_c(updates: Updates, scale: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        summed = spectral.summed(update)
        factor = spectral.polar(summed)
        mean = spectral.inner(factor, summed) / min(summed.shape[-2:])
        return mean[:, None, None] * factor, {"singular_value": mean}

    return merge_kernels(updates, one, scale)


@method(
    "iso_cts",
    family="spectral",
    source="mean(S) polar([U_1..U_K, U_c]) polar([V_1..V_K, V_c])', U_c S_c V_c' leading triplets of sum_k D_k, "
    "U_k S_k V_k' of (I - U_c U_c') D_k (Iso-CTS, arXiv 2502.04959)",
    needs=("base",),
    laws={"order": {}, "homogeneous": {}, "zero": {}},
)
def iso_cts(updates: Updates, *, common: Share = 0.8, scale: float = 1.0) -> Merged:
    """Iso-C in which the weakest directions of the sum make room for directions of single experts.

    Vectors (biases too) are averaged. Directions of singular value 0 take no part, as in `tsv_m`. One expert is made
    isotropic too. Where the experts' share is less than half a direction each (many experts, small layer), all
    directions are common: Iso-C.

    Args:
        updates: K experts measured from their base.
        common: share of the min(m, n) directions taken from the sum; the rest is divided equally among the experts,
            rounded so that it divides (the authors' rule; never more than there are). The paper's is .8.
        scale: alpha, on the merged update; the paper tunes it.
    """
    return merged(updates, *_iso_cts(updates, scale, common))


@partial(jax.jit, static_argnums=2)
def _iso_cts(updates: Updates, scale: float, common: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        shared, own = isotropic_ranks(update.shape, common)
        left, right, sigma = _blocks(update, shared, own)
        mean = sigma.sum(-1) / min(update.shape[-2:])
        ranks = {"common_rank": jnp.full(mean.shape, shared), "expert_rank": jnp.full(mean.shape, own)}
        return mean[:, None, None] * matmul(left, transpose(right)), {"singular_value": mean} | ranks

    return merge_kernels(updates, one, scale)


def isotropic_ranks(shape: tuple[int, ...], common: float) -> tuple[int, int]:
    """Directions of the sum and of each expert, for updates of shape `[K, ..., m, n]`."""
    count, size = shape[0], min(shape[-2:])
    own = min(round((size - int(size * common)) / count), size // count)
    return size - own * count, own


def _blocks(update: Array, shared: int, own: int) -> tuple[Array, Array, Array]:
    """Orthogonalised left `[n, m, r]` and right `[n, n', r]` vectors and their singular values `[n, r]`."""
    left, right, sigmas = [], [], []
    inside = jnp.zeros((*update.shape[1:-1], 0), update.dtype)
    if shared:
        # All triplets, cut: nearly as many are wanted, and the Gram matrix behind a few cannot tell apart those of a
        # flat tail, where the cut lies.
        u, sigma, v = leading_triplets(update.sum(0, keepdims=True), min(update.shape[-2:]))
        inside = u[0, ..., :shared]
        left, right, sigmas = [inside], [v[0, ..., :shared]], [sigma[0, ..., :shared]]
    if own:
        rest = jax.lax.map(lambda d: d - matmul(inside, matmul(transpose(inside), d)), update)
        rounding = spectral.tolerance(update) * spectral.norm(update, (-2, -1))
        u, sigma, v = leading_triplets(rest, own, rounding)
        # The experts' vectors are orthogonal to the common ones on this side: its polar factor falls into two.
        left.append(spectral.polar(side_by_side(u)))
        right.append(side_by_side(v))
        sigmas.append(side_by_side(sigma[..., None, :])[..., 0, :])
    return jnp.concatenate(left, -1), spectral.polar(jnp.concatenate(right, -1)), jnp.concatenate(sigmas, -1)
