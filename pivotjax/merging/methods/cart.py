"""CART: task arithmetic around the mean, on low-rank parts."""

from functools import partial

import jax
import jax.numpy as jnp

from pivotjax.errors import InputError
from pivotjax.merging import spectral
from pivotjax.merging.methods.matrices import Facts, merge_kernels, merged, total
from pivotjax.merging.registry import Fraction, Merged, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Array, Updates


@method(
    "cart",
    family="spectral",
    source="mean + strength * sum_k SVD_r(W_k - mean) (CART, arXiv 2412.12153)",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "average": {"rank": 1.0}, "single": {}, "zero": {}},
)
def cart(updates: Updates, *, rank: Fraction = 0.08, strength: float = 1.0, scale: float = 1.0) -> Merged:
    """The mean plus the leading directions of each expert's difference to it.

    No base is needed: differences to the mean do not depend on it. Vectors (biases too) are averaged. One expert
    alone is returned.

    Args:
        updates: K experts.
        rank: r as a share of min(m, n), rounded down, at least 1; .08 as in the paper. At 1 the differences sum to 0
            and the mean is returned.
        strength: the paper's lambda, on the sum of the low-rank differences; the released configuration has 1.
        scale: on the merged update as a whole; without a base only 1.
    """
    if not updates.has_base and scale != 1:
        raise InputError("cart without a base has no update to scale: give a base, or leave scale at 1 (the paper's "
                         "lambda is called strength)")
    return merged(updates, *_cart(updates, scale, strength, rank))


@partial(jax.jit, static_argnums=3)
def _cart(updates: Updates, scale: float, strength: float, share: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        mean = spectral.mean(update)
        rank = max(1, int(share * min(mean.shape[-2:]) + 1e-6))

        def cut(d: Array) -> Array:
            right = spectral.right_space(d - mean, rank)
            return matmul(matmul(d - mean, right), transpose(right))

        return mean + strength * total(cut, update), {"rank": jnp.full(mean.shape[:1], rank)}

    return merge_kernels(updates, one, scale)
