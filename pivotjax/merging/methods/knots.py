"""KnOTS: the experts' updates aligned by a joint SVD, then TIES or DARE on their coefficients."""

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging import spectral
from pivotjax.merging.methods.matrices import Facts, elected, left_directions, merge_kernels, merged
from pivotjax.merging.randomness import Seed, keys, uniform
from pivotjax.merging.registry import Fraction, Merged, method
from pivotjax.merging.spectral import matmul, norm, transpose
from pivotjax.merging.updates import Array, Layer, Updates


@method(
    "knots_ties",
    family="spectral",
    source="U TIES_k(S V_k'), U S [V_1'..V_K'] = SVD([D_1..D_K]) (KnOTS-TIES, arXiv 2410.19735)",
    needs=("base",),
    laws={
        "identical": {"density": 1.0, "scale": 1.0},
        "order": {},
        "homogeneous": {},
        "single": {"density": 1.0, "scale": 1.0},
        "zero": {},
    },
)
def knots_ties(updates: Updates, *, density: Fraction = 0.2, scale: float = 0.6) -> Merged:
    """TIES in the basis of the output space that all experts share.

    Vectors (biases too) are averaged (the authors' code joins the bias to its weight, and multiplies all by lambda).

    Args:
        updates: K experts measured from their base.
        density: share of each expert's coefficients in a layer that is kept, by magnitude; directions of singular
            value 0 are no coefficients. .2 as in the authors' configuration, which trims all layers together.
        scale: lambda, on the merged update; the authors' configuration for CLIP ViT-B/32 has .6.
    """
    return merged(updates, *_knots_ties(updates, scale, density))


@jax.jit
def _knots_ties(updates: Updates, scale: float, density: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        u, coefficients, support = _aligned(update)
        count = jnp.floor(density * support * update.shape[-1] + 1e-6).astype(jnp.int32)
        mean, kept = elected(coefficients, jnp.maximum(count, 1))
        return matmul(u, mean), {"rank": support, "coefficients_kept": kept}

    return merge_kernels(updates, one, scale)


@method(
    "knots_dare",
    family="spectral",
    source="U DARE_k(S V_k') , signs elected, U S [V_1'..V_K'] = SVD([D_1..D_K]) (KnOTS-DARE-TIES, arXiv 2410.19735)",
    needs=("base", "randomness"),
    laws={
        "identical": {"density": 1.0, "scale": 1.0},
        "order": {},
        "homogeneous": {},
        "single": {"density": 1.0, "scale": 1.0},
        "zero": {},
    },
)
def knots_dare(updates: Updates, *, density: Fraction = 0.9, scale: float = 0.6, seed: Seed = 0) -> Merged:
    """DARE on the coefficients in the shared basis, then the mean of those whose sign agrees with their sum.

    Vectors (biases too) are averaged.

    Args:
        updates: K experts measured from their base.
        density: probability with which a coefficient is kept, and divided by it; the others become 0. The authors'
            configurations for CLIP keep .9.
        scale: lambda, on the merged update.
        seed: the draws depend on it, on the expert's name and on the weight's name (and place in a stack) alone.
    """
    drawn = {layer.name: _keys(updates, layer, seed) for layer in updates.layout.layers}
    return merged(updates, *_knots_dare(updates, scale, density, drawn))


def _keys(updates: Updates, layer: Layer, seed: int) -> np.ndarray:
    """uint32 `[K, n, 2]`: a key for each expert and matrix."""
    path = updates.layout.paths[layer.weight]
    paths = [f"{path}[{i}]" for i in range(layer.count)] if layer.lead else [path]
    return np.stack([keys(seed, updates.names, one) for one in paths], 1)


@jax.jit
def _knots_dare(
    updates: Updates, scale: float, density: float, drawn: dict[str, Array]
) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array, key: Array) -> tuple[Array, Facts]:
        u, coefficients, support = _aligned(update)
        draws = jax.vmap(jax.vmap(lambda own: uniform(own, coefficients.shape[2:])))(key)
        mean, kept = elected(jnp.where(draws < density, coefficients / density, 0))
        return matmul(u, mean), {"rank": support, "coefficients_kept": kept}

    return merge_kernels(updates, one, scale, drawn)


def _aligned(update: Array) -> tuple[Array, Array, Array]:
    """Common left directions `[n, d_out, r]` of all experts, each expert's coefficients `S V_k' = U' D_k`
    `[K, n, r, d_in]`, and the number of directions that are not 0, `[n]`."""
    count, n, d_out, d_in = update.shape
    joined = update.transpose(1, 2, 0, 3).reshape(n, d_out, count * d_in)
    u = left_directions(joined)
    coefficients = matmul(transpose(u), joined)
    sigma = norm(coefficients, -1)
    alive = sigma > spectral.tolerance(joined) * sigma.max(-1, keepdims=True)
    coefficients = jnp.where(alive[..., None], coefficients, 0)
    return u, coefficients.reshape(n, -1, count, d_in).transpose(2, 0, 1, 3), alive.sum(-1)
