"""Linear algebra that the methods share: batched, float32 or better, highest precision.

One rule for the platform: LAPACK where the program runs on a CPU (or GPU); on TPU, whose compiler takes minutes for its
own SVD and QR-based `eigh`, routines that compile in seconds: Gram matrices, Jacobi `eigh`, Newton-Schulz, randomized
range finders. The routine is chosen when a program is *lowered* (`jax.lax.platform_dependent`), so one traced program
serves both and an ahead-of-time compilation for a TPU that is not here gets the TPU's.

What to expect (float32, n up to a few thousand; tests/merging/test_spectral.py holds these to float64):
- Spaces and singular triplets of well separated spectra: subspace error, orthogonality and reconstruction within 1e-5
  of the largest singular value, sigma itself within 1e-5 of the largest.
- A Gram matrix squares the condition number: of leading triplets and spaces (`rank` given) only what lies above about
  1e-3 of the largest singular value can be trusted; below `tolerance` directions are noise, counted as zero and left
  out of the numerical rank. The error of a leading space is about `eps s_1^2 / (s_r^2 - s_(r+1)^2)`: a cut inside a
  flat spectrum is as arbitrary as the spectrum is flat.
- Inside a cluster of equal singular values single directions are arbitrary; polar factors and products are not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import linalg

Array = jax.Array
PyTree = Any
Basis = Literal["energy", "cross", "average"]


def matmul(a: Array, b: Array) -> Array:
    """Batched matrix product in full precision."""
    if a.dtype != jnp.float32 or b.dtype != jnp.float32:
        return jnp.matmul(a, b, precision="highest")
    return lax.platform_dependent(a, b, tpu=matmul_by_parts, default=lambda a, b: jnp.matmul(a, b, precision="highest"))


def matmul_by_parts(a: Array, b: Array) -> Array:
    """`matmul` for TPU: what precision "highest" means there, six products of bfloat16 parts accumulated in float32,
    written as one product with a six times longer inner axis, which compiles up to eight times faster."""
    a1, a2, a3 = _parts(a)
    b1, b2, b3 = _parts(b)
    left = jnp.concatenate([a3, a2, a1, a2, a1, a1], -1)  # small terms first
    right = jnp.concatenate([b1, b2, b3, b1, b2, b1], -2)
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _parts(x: Array) -> list[Array]:
    """Three bfloat16 arrays whose sum is x to float32's precision."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, 8, 7)  # a mere cast there and back would be optimised away
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def transpose(x: Array) -> Array:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues `[..., n]`, descending, and eigenvectors `[..., n, n]` (columns) of symmetric `[..., n, n]`.

    Every eigenvector's largest entry is positive, so that results do not depend on a library's choice of signs.
    """

    def jacobi(x):
        return linalg.eigh(x, implementation=linalg.EighImplementation.JACOBI)

    vectors, values = lax.platform_dependent(x, tpu=jacobi, default=partial(_one_by_one, linalg.eigh))
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), -2)
    return values, vectors * jnp.where(largest < 0, -1, 1)


def _one_by_one(routine: Callable[..., PyTree], *batches: Array) -> PyTree:
    """A LAPACK routine over `[..., m, n]`, a matrix after the other.

    jaxlib spreads a batch over its thread pool and waits for it *on* that pool: two such calls in one program can wait
    for each other for ever. Nothing is lost, because LAPACK has threads of its own.
    """
    lead = batches[0].shape[:-2]
    results = lax.map(lambda one: routine(*one), tuple(x.reshape(-1, *x.shape[-2:]) for x in batches))
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), results)


def svd(x: Array, rank: int | None = None) -> tuple[Array, Array, Array]:
    """Singular triplets of `[..., m, n]`: U `[..., m, r]`, sigma `[..., r]` descending, V `[..., n, r]`.

    All min(m, n) of them: LAPACK; on TPU the polar factor P and then `eigh` of `P'x` (Higham and Papadimitriou 1993).
    Only the leading `rank`: the eigenvectors of the smaller Gram matrix; the other side is `x V / sigma`, brought
    back to orthonormal columns, which costs accuracy where sigma is small: see the module. sigma below the numerical
    rank is 0.
    """
    m, n = x.shape[-2:]
    if m < n:
        v, sigma, u = svd(transpose(x), rank)
        return u, sigma, v
    if rank is None or rank >= n:
        return lax.platform_dependent(x, tpu=svd_by_products, default=partial(_one_by_one, _svd_by_lapack))
    v = eigh(matmul(transpose(x), x))[1][..., :rank]
    image = matmul(x, v)
    sigma = norm(image, -2)
    order = jnp.argsort(-sigma, -1)  # nearly sorted; rounding can swap neighbours
    sigma, v, image = (jnp.take_along_axis(a, i, -1) for a, i in
                       ((sigma, order), (v, order[..., None, :]), (image, order[..., None, :])))
    sigma = _numerical(sigma, x)
    u = orthonormal(jnp.where(sigma > 0, 1, 0)[..., None, :] * image)
    return u, sigma, v


def _svd_by_lapack(x: Array) -> tuple[Array, Array, Array]:
    u, sigma, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, _numerical(sigma, x), transpose(vt)


def svd_by_products(x: Array) -> tuple[Array, Array, Array]:
    """`svd` for TPU: matrix products and one `eigh`, `[..., m, n]` with m >= n.

    U has orthonormal columns on the numerical rank; behind it they are left to rounding.
    """
    factor = _newton_schulz(x)
    h = matmul(transpose(factor), x)
    sigma, v = eigh((h + transpose(h)) / 2)
    return matmul(factor, v), _numerical(sigma, x), v


def _numerical(sigma: Array, x: Array) -> Array:
    """Descending singular values, 0 where they are rounding."""
    return jnp.where(sigma > tolerance(x) * sigma[..., :1], sigma, 0)


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

    Zero columns stay zero; a column in the span of those before it becomes noise. CPU: Cholesky QR of columns at unit
    length, three times, the first shifted, so that condition numbers up to 1/eps are mastered. TPU, whose compiler
    unrolls a large Cholesky factorisation for minutes: the polar factor, by matrix products.
    """
    return lax.platform_dependent(x, tpu=orthonormal_by_products, default=_orthonormal_by_cholesky)


def orthonormal_by_products(x: Array) -> Array:
    """`orthonormal` for TPU."""
    length = norm(x, -2)[..., None, :]
    return _newton_schulz(x / nonzero(length)) * (length > 0)


def _orthonormal_by_cholesky(x: Array) -> Array:
    eps = jnp.finfo(x.dtype).eps
    for shift in (10 * x.shape[-1] ** 0.5 * eps, 0.0, 0.0):
        length = norm(x, -2)
        dead = length <= jnp.finfo(x.dtype).tiny ** 0.5
        x = x / jnp.where(dead, 1, length)[..., None, :]
        gram = matmul(transpose(x), x) + (shift + dead)[..., None, :] * jnp.eye(x.shape[-1], dtype=x.dtype)
        x = _one_by_one(_divided_by_root, x, gram)
    return x


def _divided_by_root(x: Array, gram: Array) -> Array:
    """`x L'^-1` with `gram = L L'`."""
    factor = jnp.linalg.cholesky(gram)
    return linalg.triangular_solve(factor, x, left_side=False, lower=True, transpose_a=True)


def polar(x: Array) -> Array:
    """The polar factor of `[..., m, n]`: U V' of its thin SVD, the nearest matrix with orthonormal rows or columns.

    Where x is rank-deficient the factor is U_r V_r' of its numerical rank r, a partial isometry (0 for x = 0).
    Newton's iteration with scaled inverses on CPU, half the time of an SVD; rank-deficient matrices, and all on TPU: by
    `svd`.
    """
    m, n = x.shape[-2:]
    if m < n:
        return transpose(polar(transpose(x)))
    return lax.platform_dependent(x, tpu=polar_by_products, default=partial(_one_by_one, _polar_by_newton))


def polar_by_products(x: Array) -> Array:
    """`polar` for TPU, `[..., m, n]` with m >= n."""
    return _isometry(*svd_by_products(x))


def _isometry(u: Array, sigma: Array, v: Array) -> Array:
    return matmul(u * (sigma > 0)[..., None, :], transpose(v))


def _newton_schulz(x: Array) -> Array:
    """The polar factor by matrix products alone; directions below the numerical rank end anywhere between 0 and 1.

    Nine quintic steps, each of which makes a small sigma 3.44 times as large (coefficients of Muon's orthogonalisation)
    and leaves all above in [0.68, 1.13], then cubic steps, which converge from there.
    """
    y = x / nonzero(1.05 * _spectral_norm(x))[..., None, None]

    def quintic(_, y):
        gram = matmul(transpose(y), y)
        return 3.4445 * y + matmul(y, -4.7750 * gram + 2.0315 * matmul(gram, gram))

    def cubic(_, y):
        return 1.5 * y - 0.5 * matmul(y, matmul(transpose(y), y))

    steps = (10, 6) if x.dtype == jnp.float32 else (26, 8)
    return lax.fori_loop(0, steps[1], cubic, lax.fori_loop(0, steps[0], quintic, y))


def _spectral_norm(x: Array, steps: int = 12) -> Array:
    """The largest singular value of `[..., m, n]` by the power method, after 12 steps at most a few per cent low."""

    def power(_, v):
        v = matmul(transpose(x), matmul(x, v))
        return v / nonzero(norm(v, (-1, -2)))[..., None, None]

    start = jax.random.normal(jax.random.key(0), (x.shape[-1], 4), x.dtype)
    scale = nonzero(jnp.abs(x).max((-1, -2)))[..., None, None]
    x = x / scale  # squares of tiny entries must not vanish
    v = lax.fori_loop(0, steps, power, jnp.broadcast_to(start, (*x.shape[:-2], *start.shape)))
    columns = norm(matmul(x, v), -2) / nonzero(norm(v, -2))
    return columns.max(-1) * scale[..., 0, 0]


def _polar_by_newton(x: Array) -> Array:
    """`polar` of one matrix `[m, n]`, m >= n: Newton's iteration `X <- (g X + X^-T / g) / 2`, then Newton-Schulz.

    With g of Byers and Xu (2008), which follows from bounds on the singular values alone, one inverse brings the ratio
    l of the smallest to the largest to `2 sqrt(l) / (1 + l)`: five of them are enough for 1e-6.
    """
    q, r = (None, x) if x.shape[0] == x.shape[1] else jnp.linalg.qr(x)
    r = r / nonzero(norm(r))
    inverse = jnp.linalg.inv(r).T
    high, low = _spectral_norm(r, 4), 1 / _spectral_norm(inverse, 4)
    # Singular to working precision: the inverse is infinite, or its largest directions are rounding.
    regular = low / high > jnp.finfo(x.dtype).eps
    high, low = 1.05 * high, 0.9 * low  # estimates, not bounds

    def improve(state):
        y, scale, ratio = state
        y = 0.5 * (scale * y + jnp.linalg.inv(y).T / scale)
        return y, *_next_scale(ratio)

    def newton():
        start = 1 / jnp.sqrt(high * low)
        first = 0.5 * (start * r + inverse / start)
        y, _, _ = lax.while_loop(lambda state: state[2] < 0.99, improve, (first, *_next_scale(low / high)))
        return _newton_schulz_to_the_end(y)

    y = lax.cond(regular, newton, lambda: _isometry(*_svd_by_lapack(r)))
    return y if q is None else matmul(q, y)


def _next_scale(ratio: Array) -> tuple[Array, Array]:
    """After a step on singular values with `smallest / largest = ratio`, scaled to have a product of 1: the next g, and
    the ratio after the step."""
    after = 2 * jnp.sqrt(ratio) / (1 + ratio)  # the step's values lie in [1, 1 / after]
    return jnp.sqrt(after), after


def _newton_schulz_to_the_end(y: Array) -> Array:
    """The polar factor of `[n, n]` with singular values near 1, by cubic steps: each squares what is missing."""
    near = y.shape[-1] ** 0.25 * jnp.finfo(y.dtype).eps ** 0.5

    def improve(state):
        y, gram, step = state
        y = 1.5 * y - 0.5 * matmul(y, gram)
        return y, matmul(y.T, y), step + 1

    def apart(gram):
        return _spectral_norm(gram - jnp.eye(gram.shape[-1], dtype=gram.dtype), 4)

    start = y, matmul(y.T, y), 0
    y, gram, _ = lax.while_loop(lambda state: (apart(state[1]) > near) & (state[2] < 8), improve, start)
    return 1.5 * y - 0.5 * matmul(y, gram)


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


def nonzero(x: Array) -> Array:
    """`x`, or 1 where it is 0: for quotients whose numerator is 0 there too."""
    return jnp.where(x == 0, 1, x)


def summed(x: Array) -> Array:
    """The sum over the leading axis. XLA's own for the CPU takes 20 times as long as one slice after the other."""
    return lax.platform_dependent(x, cpu=lambda x: sum(x[i] for i in range(len(x))), default=lambda x: x.sum(0))


def mean(x: Array) -> Array:
    """The mean over the leading axis, likewise."""
    return summed(x) / len(x)


def inner(a: Array, b: Array) -> Array:
    """Inner products of matrices, `[..., p, q]` -> `[...]`."""
    # The barrier keeps XLA from making one reduction of the two: a reduction to a scalar runs on one core.
    return lax.optimization_barrier((a * b).sum(-1)).sum(-1)


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


def fit(moment: Array, gram: Array, fallback: Array, route: Callable[[Array, Array], Array] | None = None) -> Array:
    """The least squares solution `D = moment gram^-1`, drawn to `fallback` where the data say nothing.

    Minimises `sum_k alpha_k |(D - D_k) X_k'|^2 + ridge |(D - fallback) S|^2` with `moment = sum_k alpha_k D_k X_k'X_k`,
    `gram = sum_k alpha_k X_k'X_k`, `S^2 = diag(gram)` (its mean where an input is always 0) and a ridge of 100 machine
    epsilons: enough for the Cholesky factor to exist, too little to show where the data decide.

    Args:
        moment: `[..., d_out, d_in]`.
        gram: `[..., d_in, d_in]`, symmetric, positive semidefinite.
        fallback: `[..., d_out, d_in]`.
        route: how positive definite systems are solved; None: `solve`.

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
    return fallback + (route or solve)(missing, matrix) * scale[..., None, :]


def solve(right: Array, matrix: Array) -> Array:
    """`right matrix^-1` for symmetric positive definite `[..., n, n]`: Cholesky; on TPU `solve_by_products`."""
    by_cholesky = partial(_one_by_one, _solve_by_cholesky)
    return lax.platform_dependent(right, matrix, tpu=solve_by_products, default=by_cholesky)


def solve_by_products(right: Array, matrix: Array) -> Array:
    """`solve` for TPU: conjugate gradients, a system for each row of `right`, to a relative residual of 1e-6 (float64:
    1e-12) or 500 steps. Wants a diagonal of about 1."""
    tolerance, size = (1e-12 if right.dtype == jnp.float64 else 1e-6) ** 2, (right * right).sum(-1, keepdims=True)

    def improve(state):
        step, solved, rest, direction, square = state
        image = matmul(direction, matrix)
        length = square / nonzero((direction * image).sum(-1, keepdims=True))
        rest = rest - length * image
        new = (rest * rest).sum(-1, keepdims=True)
        return step + 1, solved + length * direction, rest, rest + new / nonzero(square) * direction, new

    start = 0, jnp.zeros_like(right), right, right, size
    return lax.while_loop(lambda state: (state[0] < 500) & (state[4] > tolerance * size).any(), improve, start)[1]


def _solve_by_cholesky(right: Array, matrix: Array) -> Array:
    factor = jnp.linalg.cholesky(matrix)
    half = linalg.triangular_solve(factor, right, left_side=False, lower=True, transpose_a=True)
    return linalg.triangular_solve(factor, half, left_side=False, lower=True)
