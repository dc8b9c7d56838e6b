"""STAR: each update cut to its strong directions, at its old nuclear norm, averaged."""

from typing import Annotated

import jax
import jax.numpy as jnp

from pivotjax.merging.methods.matrices import Facts, left_directions, merge_kernels, merged
from pivotjax.merging.registry import Bounds, Merged, method
from pivotjax.merging.spectral import leading, matmul, norm, transpose
from pivotjax.merging.updates import Array, Updates

Percent = Annotated[float, Bounds(0, 100, open_low=True)]


@method(
    "star",
    family="spectral",
    source="mean_k |D_k|_* / |SVD_r(D_k)|_* SVD_r(D_k), r the smallest rank that keeps eta % of the nuclear norm "
    "(STAR, arXiv 2502.10339)",
    needs=("base",),
    laws={"identical": {"eta": 100.0}, "order": {}, "homogeneous": {}, "average": {"eta": 100.0},
          "single": {"eta": 100.0}, "zero": {}},
)  # fmt: skip
def star(updates: Updates, *, eta: Percent = 40.0, scale: float = 1.0) -> Merged:
    """Truncates the spectrum of each update, rescales what is left to the old nuclear norm, averages.

    Vectors (biases too) are averaged as they are. One expert is truncated too.

    Args:
        updates: K experts measured from their base.
        eta: per cent of an update's nuclear norm that its leading directions must reach; 40 as in the paper.
        scale: on the merged update; the paper has none (1).
    """
    return merged(updates, *_star(updates, scale, eta / 100))


@jax.jit
def _star(updates: Updates, scale: float, share: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        if update.shape[-2] > update.shape[-1]:
            flipped, facts = one(transpose(update))
            return transpose(flipped), facts

        def add(so_far: Array, d: Array) -> tuple[Array, Array]:
            u = left_directions(d)
            image = matmul(transpose(u), d)
            sigma = norm(image, -1)
            kept = leading(sigma, share, None)
            factor = sigma.sum(-1) / jnp.where(kept, sigma, 0).sum(-1).clip(jnp.finfo(d.dtype).tiny)
            cut = matmul(u * jnp.where(kept, factor[..., None], 0)[..., None, :], image)
            return so_far + cut, kept.sum(-1)

        merged_update, ranks = jax.lax.scan(add, jnp.zeros_like(update[0]), update)
        return merged_update / len(update), {"ranks": ranks.T}

    return merge_kernels(updates, one, scale)
