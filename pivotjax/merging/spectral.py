"""Linear algebra that the methods share: batched, float32 or better, highest precision.

One rule for the platform: LAPACK where the program runs on a CPU (or GPU); on TPU, whose compiler takes minutes for its
own SVD and QR-based `eigh`, routines that compile in seconds: Gram matrices, Jacobi `eigh`, Newton-Schulz, randomized
range finders. The routine is chosen when a program is *lowered* (`jax.lax.platform_dependent`), so one traced program
serves both and an ahead-of-time compilation for a TPU that is not here gets the TPU's.

What to expect (float32, n up to a few thousand; tests/merging/test_spectral.py holds these to float64):
- Spaces and singular triplets of well separated spectra: subspace error, orthogonality and reconstruction within 1e-5
  of the largest singular value, sigma itself within 1e-5 of the largest.
- A Gram matrix squares the condition number. Directions below about 1e-3 of the largest singular value are found as a
  space, not one by one; below `tolerance` they are noise, counted as zero and left out of the numerical rank.
- Inside a cluster of equal singular values single directions are arbitrary; projectors, polar factors and products are not.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import linalg

Array = jax.Array
Basis = Literal["energy", "cross", "average"]


def matmul(a: Array, b: Array) -> Array:
    """Batched matrix product in full precision."""
    return jnp.matmul(a, b, precision="highest")


def transpose(x: Array) -> Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues `[..., n]`, descending, and eigenvectors `[..., n, n]` (columns) of symmetric `[..., n, n]`.

    Every eigenvector's largest entry is positive, so that results do not depend on a library's choice of signs.
    """

    def jacobi(x):
        return linalg.eigh(x, implementation=linalg.EighImplementation.JACOBI)

    vectors, values = lax.platform_dependent(x, tpu=jacobi, default=linalg.eigh)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), -2)
    return values, vectors * jnp.where(largest < 0, -1, 1)


def svd(x: Array, rank: int | None = None) -> tuple[Array, Array, Array]:
    """The leading singular triplets of `[..., m, n]`: U `[..., m, r]`, sigma `[..., r]` descending, V `[..., n, r]`.

    By the eigenvectors of the smaller Gram matrix. The other side is `x V / sigma`, brought back to orthonormal columns
    (`orthonormal`), which costs accuracy where sigma is small: see the module. Columns of directions with sigma 0
    (below the numerical rank) are zero on that side.

    Args:
        x: real matrices.
        rank: how many triplets; None: min(m, n), which it never exceeds.
    """
    m, n = x.shape[-2:]
    if m < n:
        v, sigma, u = svd(transpose(x), rank)
        return u, sigma, v
    v = eigh(matmul(transpose(x), x))[1][..., : min(m, n) if rank is None else min(rank, m, n)]
    image = matmul(x, v)
    sigma = norm(image, -2)
    order = jnp.argsort(-sigma, -1)  # nearly sorted; rounding can swap neighbours
    sigma, v, image = (jnp.take_along_axis(a, i, -1) for a, i in
                       ((sigma, order), (v, order[..., None, :]), (image, order[..., None, :])))
    kept = sigma > tolerance(x) * sigma[..., :1]
    u = orthonormal(jnp.where(kept[..., None, :], image / jnp.where(kept, sigma, 1)[..., None, :], 0))
    return u, jnp.where(kept, sigma, 0), v


def singular_values(x: Array) -> Array:
    """All min(m, n) singular values, descending, by the smaller Gram matrix (see the module on small ones)."""
    m, n = x.shape[-2:]
    values = eigh(matmul(x, transpose(x)) if m < n else matmul(transpose(x), x))[0]
    return jnp.sqrt(jnp.maximum(values, 0))


def right_space(x: Array, rank: int) -> Array:
    """An orthonormal basis `[..., n, r]` of the leading right singular space of `[..., m, n]`, r <= min(m, n).

    Any basis: only its span means something. Cheaper than `svd`.
    """
    m, n = x.shape[-2:]
    rank = min(rank, m, n)
    if n <= m:
        return eigh(matmul(transpose(x), x))[1][..., :rank]
    left = eigh(matmul(x, transpose(x)))[1][..., :rank]
    return orthonormal(matmul(transpose(x), left))


def left_space(x: Array, rank: int) -> Array:
    """The same for the left singular space: `[..., m, r]`."""
    return right_space(transpose(x), rank)


def orthonormal(x: Array) -> Array:
    """Orthonormal columns with the span of `[..., m, r]`, m >= r, near to `x` where its columns nearly are orthonormal.

    Cholesky QR of columns at unit length, three times, the first shifted, so that condition numbers up to 1/eps are
    mastered. Zero columns stay zero; a column in the span of those before it becomes noise.
    """
    eps = jnp.finfo(x.dtype).eps
    for shift in (10 * x.shape[-1] ** 0.5 * eps, 0.0, 0.0):
        length = norm(x, -2)
        dead = length <= jnp.finfo(x.dtype).tiny**0.5
        x = x / jnp.where(dead, 1, length)[..., None, :]
        gram = matmul(transpose(x), x) + (shift + dead)[..., None, :] * jnp.eye(x.shape[-1], dtype=x.dtype)
        factor = jnp.linalg.cholesky(gram)
        x = linalg.triangular_solve(factor, x, left_side=False, lower=True, transpose_a=True)
    return x


def polar(x: Array) -> Array:
    """The polar factor of `[..., m, n]`: U V' of its thin SVD, the nearest matrix with orthonormal rows or columns.

    Where x is rank-deficient the factor is U_r V_r' of its numerical rank r, a partial isometry (0 for x = 0).
    CPU: Newton's iteration with scaled inverses, twice as fast as an SVD; TPU, and rank-deficient matrices: the Gram
    matrix's eigenvectors.
    """
    m, n = x.shape[-2:]
    if m < n:
        return transpose(polar(transpose(x)))
    flat = x.reshape(-1, m, n)
    flat = lax.platform_dependent(flat, tpu=polar_by_gram, default=lambda y: lax.map(_polar_by_newton, y))
    return flat.reshape(x.shape)


def polar_by_gram(x: Array) -> Array:
    """`polar` without LAPACK: `[..., m, n]`, m >= n."""
    u, sigma, v = svd(x)
    return matmul(u * (sigma > 0)[..., None, :], transpose(v))


def _polar_by_newton(x: Array) -> Array:
    """`polar` of one matrix `[m, n]`, m >= n: X <- (g X + X^-T / g) / 2, g Higham's scaling, two Newton-Schulz steps."""
    q, r = (None, x) if x.shape[0] == x.shape[1] else jnp.linalg.qr(x)
    identity = jnp.eye(r.shape[0], dtype=r.dtype)

    def improve(state):
        y, _, step = state
        inverse = jnp.linalg.inv(y).T
        scale = jnp.sqrt(_one_inf(inverse) / _one_inf(y))
        new = 0.5 * (scale * y + inverse / scale)
        return new, norm(new - y) / norm(new), step + 1

    start = r / jnp.where(norm(r) > 0, norm(r), 1)
    y, _, _ = lax.while_loop(lambda s: (s[1] > 1e-2) & (s[2] < 30), improve, (start, jnp.array(jnp.inf, x.dtype), 0))
    for _ in range(2 if x.dtype == jnp.float32 else 3):
        y = matmul(y, 1.5 * identity - 0.5 * matmul(y.T, y))
    # Singular to working precision: the inverse is infinite, or so ill-conditioned that noise would become directions.
    regular = jnp.isfinite(y).all() & (_smallest(r, y) > tolerance(x))
    y = lax.cond(regular, lambda: y, lambda: polar_by_gram(r))
    return y if q is None else matmul(q, y)


def _smallest(x: Array, polar_factor: Array) -> Array:
    """About sigma_min / sigma_max of a square x = P H: by the pivots of H's Cholesky factor."""
    h = matmul(polar_factor.T, x)
    pivots = jnp.abs(jnp.diagonal(jnp.linalg.cholesky((h + h.T) / 2)))
    return jnp.nan_to_num((pivots.min() / pivots.max()) ** 2, nan=0.0)


def _one_inf(x: Array) -> Array:
    return jnp.sqrt(jnp.abs(x).sum(-1).max() * jnp.abs(x).sum(-2).max())


def randomized(x: Array, rank: int, oversample: int = 16, iterations: int = 3) -> tuple[Array, Array, Array]:
    """Leading singular triplets by a randomized range finder with subspace iterations (Halko, Martinsson, Tropp 2011).

    Cost: 2 (iterations + 1) products with x. Exact to rounding where the spectrum falls off behind `rank + oversample`;
    on a flat spectrum sigma is a few per cent low and directions are a space of large, not the largest, singular
    values. The start is fixed: the same x gives the same answer.

    Returns:
        As `svd`.
    """
    m, n = x.shape[-2:]
    width = min(rank + oversample, m, n)
    sketch = jax.random.normal(jax.random.key(0), (n, width), x.dtype)
    basis = orthonormal(matmul(x, jnp.broadcast_to(sketch, (*x.shape[:-2], n, width))))
    for _ in range(iterations):
        basis = orthonormal(matmul(x, orthonormal(matmul(transpose(x), basis))))
    u, sigma, v = svd(matmul(transpose(basis), x), min(rank, width))
    return matmul(basis, u), sigma, v


def principal_cosines(a: Array, b: Array) -> Array:
    """Cosines of the principal angles between the spans of orthonormal `[..., d, r]` and `[..., d, s]`, descending."""
    return jnp.minimum(singular_values(matmul(transpose(a), b)), 1)


def align(basis: Array, reference: Array) -> Array:
    """`basis` turned inside its span to lie nearest to `reference`, both orthonormal `[..., d, r]` (Procrustes)."""
    return matmul(basis, polar(matmul(transpose(basis), reference)))


def pinv(gram: Array, rtol: float | None = None) -> Array:
    """Pseudo-inverse of symmetric positive semidefinite `[..., n, n]`; eigenvalues up to `rtol` x the largest are 0
    (None: `tolerance`)."""
    values, vectors = eigh(gram)
    kept = values > (tolerance(gram) if rtol is None else rtol) * values[..., :1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return matmul(vectors * inverse[..., None, :], transpose(vectors))


def tolerance(x: Array) -> float:
    """4 sqrt(max(m, n)) eps: what is smaller, relative to the largest singular value, is rounding."""
    return float(4 * max(x.shape[-2:]) ** 0.5 * jnp.finfo(x.dtype).eps)


def norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Euclidean (Frobenius) norm over `axis`; None: over everything, in rows first, so that threads share the work."""
    squares = x * x
    return jnp.sqrt(squares.sum(axis) if axis is not None else squares.sum(-1).sum())


def shared_space(moment: Array) -> tuple[Array, Array]:
    """Spectrum `[n, d]`, descending, negative values as 0, and directions `[n, d, d]` (columns) of a moment matrix
    `[n, d, d]` (see `decomposition.moment`)."""
    values, vectors = eigh(moment)
    return jnp.maximum(values, 0), vectors


def leading(spectrum: Array, energy: float, rank: int | None) -> Array:
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


def shrink(gram: Array, rho: float) -> Array:
    """Multiplies the off-diagonal entries of `[..., n, n]` by `rho` (RegMean's regularisation)."""
    return jnp.where(jnp.eye(gram.shape[-1], dtype=bool), gram, rho * gram)


def root(gram: Array) -> tuple[Array, Array]:
    """Symmetric square root of positive semidefinite `[..., n, n]`, and its pseudo-inverse."""
    values, vectors = eigh(gram)
    positive = values > gram.shape[-1] * jnp.finfo(gram.dtype).eps * values[..., :1]
    size = jnp.sqrt(jnp.where(positive, values, 1))[..., None, :]
    positive = positive[..., None, :]
    forward = matmul(vectors * jnp.where(positive, size, 0), transpose(vectors))
    backward = matmul(vectors * jnp.where(positive, 1 / size, 0), transpose(vectors))
    return forward, backward


def fit(moment: Array, gram: Array, fallback: Array) -> Array:
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
