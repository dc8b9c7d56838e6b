"""Linear algebra that the methods share: batched, float32 or better, highest precision.

Where a decomposition is needed it is a symmetric eigenproblem of a Gram matrix: LAPACK on the CPU, Jacobi on TPU, whose
default QDWH takes minutes to compile. `platform` None means where JAX runs. A Gram matrix squares the
condition number: directions below about sqrt(eps) of the largest singular value are noise, and no method here relies on
one of them alone.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import linalg

Basis = Literal["energy", "cross"]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched matrix product in full precision."""
    return jnp.matmul(a, b, precision="highest")


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def eigh(x: jax.Array, platform: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `[..., n]`, descending, and eigenvectors `[..., n, n]` (columns) of symmetric `[..., n, n]`.

    Every eigenvector's largest entry is positive, so that results do not depend on a library's choice of signs.
    """
    jacobi = (platform or jax.default_backend()) == "tpu"
    vectors, values = linalg.eigh(x, implementation=linalg.EighImplementation.JACOBI if jacobi else None)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), -2)
    return values, vectors * jnp.where(largest < 0, -1, 1)


def shared_space(
    effects: jax.Array, basis: Basis, platform: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Directions of the output space, most shared first.

    `energy`: eigenvectors of `sum_k E_k E_k'`, the left singular vectors of `[E_1 ... E_K]`.
    `cross`: eigenvectors of `sum_{j != k} E_j E_k'`, what different experts have in common; a negative eigenvalue is a
    direction in which experts contradict each other. With one expert nothing is common and `energy` is meant.

    Args:
        effects: `[K, n, d_out, d_in]`.
        basis: `energy` or `cross`.
        platform: see the module.

    Returns:
        Spectrum `[n, d_out]`, descending (negative values of `cross` are 0), and the basis `[n, d_out, d_out]`.
    """
    own = matmul(effects, transpose(effects)).sum(0)
    if basis == "cross" and effects.shape[0] > 1:
        total = effects.sum(0)
        own = matmul(total, transpose(total)) - own
    values, vectors = eigh(own, platform)
    return jnp.maximum(values, 0), vectors


def leading(spectrum: jax.Array, energy: float, rank: int | None) -> jax.Array:
    """Which directions are kept: True for the first r of them.

    Args:
        spectrum: `[..., d]`, descending, not negative.
        energy: r is the smallest number whose eigenvalues sum to this share of the spectrum; 1 keeps all directions.
        rank: a fixed r instead.

    Returns:
        bool `[..., d]`.
    """
    size = spectrum.shape[-1]
    if rank is not None:
        return jnp.broadcast_to(jnp.arange(size) < rank, spectrum.shape)
    before = jnp.cumsum(spectrum, -1) - spectrum
    return (before < energy * spectrum.sum(-1, keepdims=True)) | (energy >= 1)


def shrink(gram: jax.Array, rho: float) -> jax.Array:
    """Multiplies the off-diagonal entries of `[..., n, n]` by `rho` (RegMean's regularisation)."""
    return jnp.where(jnp.eye(gram.shape[-1], dtype=bool), gram, rho * gram)


def root(gram: jax.Array, platform: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Symmetric square root of positive semidefinite `[..., n, n]`, and its pseudo-inverse."""
    values, vectors = eigh(gram, platform)
    floor = gram.shape[-1] * jnp.finfo(gram.dtype).eps * values[..., :1]
    positive = values > floor
    size = jnp.sqrt(jnp.where(positive, values, 1))[..., None, :]
    positive = positive[..., None, :]
    forward = matmul(vectors * jnp.where(positive, size, 0), transpose(vectors))
    backward = matmul(vectors * jnp.where(positive, 1 / size, 0), transpose(vectors))
    return forward, backward


def fit(moment: jax.Array, gram: jax.Array, fallback: jax.Array) -> jax.Array:
    """The least squares solution `D = moment gram^-1`, drawn to `fallback` where the data say nothing.

    Minimises `sum_k alpha_k |(D - D_k) X_k'|^2 + ridge |(D - fallback) S|^2` with `moment = sum_k alpha_k D_k X_k'X_k`,
    `gram = sum_k alpha_k X_k'X_k`, `S^2 = diag(gram)` (its mean where an input is always 0) and a ridge of 100 machine
    epsilons: enough for the Cholesky factor to exist, too little to show where the data decide.

    Args:
        moment: `[..., d_out, d_in]`.
        gram: `[..., d_in, d_in]`, symmetric, positive semidefinite.
        fallback: `[..., d_out, d_in]`.

    Returns:
        `[..., d_out, d_in]`.
    """
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = jnp.maximum(diagonal.mean(-1, keepdims=True), jnp.finfo(gram.dtype).tiny)
    scale = 1 / jnp.sqrt(jnp.where(diagonal > 1e-6 * mean, diagonal, mean))  # inputs' units do not matter
    ridge = 100 * jnp.finfo(gram.dtype).eps
    matrix = gram * scale[..., :, None] * scale[..., None, :] + ridge * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    # Solved for the difference to the fallback, so that it is exact where the fallback already is the solution.
    missing = (moment - matmul(fallback, gram)) * scale[..., None, :]
    factor = jnp.linalg.cholesky(matrix)
    half = linalg.triangular_solve(factor, transpose(missing), left_side=True, lower=True)
    solved = linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
    return fallback + transpose(solved) * scale[..., None, :]
