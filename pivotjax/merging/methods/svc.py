"""Singular Value Calibration: directions that several experts share are not counted several times."""

from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.merging.methods.matrices import Facts, left_directions, merge_kernels, merged
from pivotjax.merging.registry import METHODS, Merged, Positive, method
from pivotjax.merging.spectral import matmul, norm, summed, tolerance, transpose
from pivotjax.merging.updates import Array, Updates

Of = Literal["sum", "task_arithmetic", "ties", "tsv_m", "star", "wudi"]


@method(
    "svc",
    family="spectral",
    source="U diag(gamma S) V', U S V' = SVD(M), gamma_r = K / sum_k max(alpha, s_rk), "
    "s_rk = <u_r'M, u_r'D_k> / |u_r'D_k|^2 (SVC, arXiv 2602.05536)",
    needs=("base",),
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def svc(updates: Updates, *, of: Of = "sum", alpha: Positive = 1.0, scale: float = 1.0) -> Merged:
    """Rescales the singular values of a merged update M by how often the experts' responses are contained in it.

    `s_rk` is how many times expert k's own response `u_r'D_k` is in M's response in direction r: K for a direction in
    which identical experts are summed, 1 for one that expert k has alone. So the sum of identical experts becomes that
    expert, and orthogonal experts are summed as they are. Where expert k has no response but rounding
    (`spectral.tolerance` of its norm), `s_rk` counts as 0.

    Vectors (biases too) are averaged for `of="sum"`, else they are what that method makes of them. Isotropic merges
    (`iso_c`, `iso_cts`) are not offered: with equal singular values any basis is a singular basis, and the result would
    depend on rounding.

    Args:
        updates: K experts measured from their base.
        of: what is calibrated: the plain sum of the updates, or what a method gives at its defaults.
        alpha: floor of `s_rk`. At 1 (the paper's) over-counted directions shrink and nothing grows; below 1 directions
            that M holds less than once are enlarged, up to 1 / alpha.
        scale: on the calibrated update.
    """
    inner = None
    if of != "sum":
        chosen = METHODS[of]
        inner = chosen.function(updates, **chosen.options).leaves
    leaves, facts = _svc(updates, scale, alpha, inner)
    result = merged(updates, leaves, facts)
    return result if inner is None else result._replace(exceptions=dict.fromkeys(result.exceptions, f"as in {of}"))


@jax.jit
def _svc(
    updates: Updates, scale: float, alpha: float, inner: list[Array] | None
) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array, before: Array | None = None) -> tuple[Array, Facts]:
        before = summed(update) if before is None else before[0]
        u = left_directions(before)
        response = matmul(transpose(u), before)

        def contained(d: Array) -> Array:
            own = matmul(transpose(u), d)
            size = norm(own, -1)
            responds = size > tolerance(d) * norm(d, (-2, -1))[..., None]
            return jnp.maximum(alpha, (response * own).sum(-1) / jnp.where(responds, size, jnp.inf) ** 2)

        gamma = len(update) / jax.lax.map(contained, update).sum(0)
        sigma = norm(response, -1)
        kept = (gamma * sigma).sum(-1) / jnp.maximum(sigma.sum(-1), jnp.finfo(sigma.dtype).tiny)
        return matmul(u * gamma[..., None, :], response), {"nuclear_norm_kept": kept}

    if inner is None:
        return merge_kernels(updates, one, scale)
    alone = Updates(("merged",), updates.layout, None, tuple((leaf,) for leaf in inner))
    leaves, facts = merge_kernels(updates, one, scale, alone.kernels)
    weights = updates.layout.weights
    return [leaf if i in weights else scale * inner[i] for i, leaf in enumerate(leaves)], facts
