"""The spectral core against NumPy float64, on kind and on adversarial spectra.

Tolerances are relative to the largest singular value. Spaces and orthogonality: 1e-5 for spectra with gaps; where sigma
falls below 1e-3 of the largest only what a caller can count on is asked: orthonormal columns, reconstruction, the
space as a whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotjax.merging import spectral

settings.register_profile("merging", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("merging")


def matrix(spectrum, m, n, seed=0):
    """A float32 matrix with the given singular values, and its exact (float64) singular vectors."""
    rng = np.random.default_rng(seed)
    r = len(spectrum)
    u, v = (np.linalg.qr(rng.normal(size=(d, r)))[0] for d in (m, n))
    return (u * spectrum) @ v.T, u, v


def off(basis):
    """How far columns are from orthonormal (largest entry)."""
    return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


def distance(a, b):
    """Between the spans of orthonormal columns: norm of the difference of their projectors."""
    return np.linalg.norm(a @ a.T - b @ b.T, 2)


# Jitted once a shape: op by op these tests would mostly compile.
polar, svd, svd_by_products = map(jax.jit, (spectral.polar, spectral.svd, spectral.svd_by_products))
leading = jax.jit(spectral.svd, static_argnums=1)
SEPARATED = np.geomspace(1, 0.02, 12)
SHAPES = [(40, 12), (12, 40), (12, 12)]


@pytest.mark.parametrize("m, n", SHAPES)
def test_separated_spectra(m, n):
    """Triplets, spaces, orthogonality and reconstruction within 1e-5 (a space's error is about
    eps sigma_1^2 / (sigma_r^2 - sigma_(r+1)^2))."""
    x, u, v = matrix(SEPARATED, m, n)
    x32 = jnp.asarray(x, jnp.float32)
    got_u, sigma, got_v = map(np.float64, svd(x32))
    np.testing.assert_allclose(sigma, SEPARATED, atol=1e-6)
    assert off(got_u) < 1e-5 and off(got_v) < 1e-5
    np.testing.assert_allclose((got_u * sigma) @ got_v.T, x, atol=1e-5)
    for rank in (1, 3, 6):
        assert distance(np.float64(spectral.left_space(x32, rank)), u[:, :rank]) < 1e-5
        assert distance(np.float64(spectral.right_space(x32, rank)), v[:, :rank]) < 1e-5
        lead_u, lead_sigma, lead_v = map(np.float64, leading(x32, rank))
        assert distance(lead_u, u[:, :rank]) < 1e-5 and distance(lead_v, v[:, :rank]) < 1e-5
        np.testing.assert_allclose(lead_sigma, SEPARATED[:rank], atol=1e-6)


@pytest.mark.parametrize("m, n", SHAPES)
def test_polar_factor_of_regular_matrices(m, n):
    """Both routes, condition number 50 and 1000; the error of a polar factor grows with it."""
    for low, tolerance in ((0.02, 2e-5), (1e-3, 4e-4)):
        x, u, v = matrix(np.geomspace(1, low, min(m, n)), m, n)
        x32 = jnp.asarray(x, jnp.float32)
        for route in (polar, jax.jit(spectral.polar_by_products)) if m >= n else (polar,):
            got = np.float64(route(x32))
            np.testing.assert_allclose(got, u @ v.T, atol=tolerance)
            assert off(got if m >= n else got.T) < 1e-5


def test_float64_is_not_rounded():
    with jax.enable_x64(True):
        x, u, v = matrix(SEPARATED, 40, 12)
        assert np.abs(spectral.polar(jnp.asarray(x)) - u @ v.T).max() < 1e-12
        got_u, sigma, _ = spectral.svd(jnp.asarray(x))
        assert off(np.asarray(got_u)) < 1e-12 and np.abs(sigma - SEPARATED).max() < 1e-12


spectra = st.one_of(
    st.integers(1, 12).map(lambda r: np.r_[np.ones(r), np.zeros(12 - r)]),  # repeated, rank-deficient, rank 1
    st.floats(-7, -1).map(lambda e: np.geomspace(1, 10**e, 12)),  # huge dynamic range
    st.floats(-20, 15).map(lambda e: 10**e * np.linspace(1, 0.1, 12)),  # tiny and large units
    st.just(np.zeros(12)),
    st.lists(st.floats(0, 1), min_size=12, max_size=12).map(lambda s: np.sort(np.array(s))[::-1]),
)


@pytest.mark.parametrize("route", [svd, svd_by_products])
@given(spectra, st.sampled_from([(24, 12), (12, 12)]), st.integers(0, 3))
def test_adversarial_spectra(route, spectrum, shape, seed):
    """Whatever the spectrum, on CPU's and TPU's route: finite, sigma within 1e-5, the product reconstructs, columns
    orthonormal on the numerical rank (TPU: where sigma is above 1e-4 of the largest)."""
    x, _, _ = matrix(spectrum, *shape, seed)
    x32, top = jnp.asarray(x, jnp.float32), max(spectrum[0], 1e-30)
    u, sigma, v = map(np.float64, route(x32))
    assert np.isfinite(u).all() and np.isfinite(v).all()
    np.testing.assert_allclose(sigma, np.sort(spectrum)[::-1], atol=1e-5 * top)
    np.testing.assert_allclose((u * sigma) @ v.T, x, atol=2e-5 * top)
    rank = int((sigma > (0 if route is svd else 1e-4 * top)).sum())
    if rank:
        assert off(u[:, :rank]) < 1e-4 and off(v[:, :rank]) < 1e-4


@given(spectra, st.sampled_from([(24, 12), (12, 24), (12, 12)]), st.integers(0, 3), st.integers(1, 11))
def test_leading_triplets_of_adversarial_spectra(spectrum, shape, seed, rank):
    """Leading triplets give the best approximation of that rank, as far as sigma is above 1e-3 of the largest."""
    x, _, _ = matrix(spectrum, *shape, seed)
    top = max(spectrum[0], 1e-30)
    u, sigma, v = map(np.float64, leading(jnp.asarray(x, jnp.float32), rank))
    assert np.isfinite(u).all() and np.isfinite(v).all()
    error = np.linalg.norm(x - (u * sigma) @ v.T, 2)
    assert error <= np.sort(spectrum)[::-1][rank] + 2e-3 * top
    trusted = int((sigma > 1e-3 * top).sum())
    if trusted:
        assert off(u[:, :trusted]) < 1e-4 and off(v[:, :trusted]) < 1e-4


@given(spectra, st.sampled_from([(24, 12), (12, 24), (12, 12)]), st.integers(0, 3))
def test_polar_factor_of_anything_is_a_partial_isometry(spectrum, shape, seed):
    """P P' P = P, and P'x is symmetric positive: P turns nothing that x does not."""
    x, _, _ = matrix(spectrum, *shape, seed)
    top = max(spectrum[0], 1e-30)
    p = np.float64(polar(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(p @ p.T @ p, p, atol=1e-4)
    h = p.T @ x / top
    np.testing.assert_allclose(h, h.T, atol=1e-4)
    np.testing.assert_allclose(np.trace(h), np.sum(spectrum) / top, atol=1e-3)


def test_rank_deficient_polar_factor():
    """U_r V_r' of the numerical rank, not an arbitrary completion; 0 for 0."""
    x, u, v = matrix([1, 0.5, 0.1], 30, 30)
    np.testing.assert_allclose(spectral.polar(jnp.asarray(x, jnp.float32)), u @ v.T, atol=2e-5)
    assert not np.asarray(spectral.polar(jnp.zeros((2, 5, 4)))).any()


def test_randomized_triplets():
    """Exact where the spectrum falls off; on a flat one sigma is low by a few per cent, never high."""
    x, u, _ = matrix(np.r_[np.linspace(1, 0.5, 8), 1e-3 * np.ones(52)], 100, 80)
    got_u, sigma, got_v = map(np.float64, spectral.randomized(jnp.asarray(x, jnp.float32), 8))
    np.testing.assert_allclose(sigma, np.linspace(1, 0.5, 8), atol=1e-5)
    assert distance(got_u, u[:, :8]) < 1e-4 and off(got_u) < 1e-5 and off(got_v) < 1e-5
    noise = np.random.default_rng(0).normal(size=(200, 150))
    exact = np.linalg.svd(noise, compute_uv=False)[:8]
    sigma = np.asarray(spectral.randomized(jnp.asarray(noise, jnp.float32), 8)[1])
    assert (sigma <= exact * (1 + 1e-5)).all() and (sigma > 0.93 * exact).all()


def test_products_in_parts_have_float32_precision():
    """TPU's form of a float32 product: no worse than twice the error of the CPU's own."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s) * np.exp(rng.normal(size=s)) for s in ((3, 40, 500), (3, 500, 30)))
    exact, scale = a @ b, np.abs(a) @ np.abs(b)
    a32, b32 = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    exact = np.float64(a32) @ np.float64(b32)
    worst = [np.max(np.abs(np.float64(f(a32, b32)) - exact) / scale) for f in (spectral.matmul_by_parts, jnp.matmul)]
    assert worst[0] < 5e-7 and worst[0] < 4 * worst[1]


def test_pseudo_inverse():
    x, _, _ = matrix([1, 0.7, 0.2], 10, 10)
    gram = jnp.asarray(x.T @ x, jnp.float32)
    np.testing.assert_allclose(spectral.pinv(gram), np.linalg.pinv(x.T @ x, rcond=1e-4), atol=1e-3)
    assert not np.asarray(spectral.pinv(jnp.zeros((4, 4)))).any()


def test_principal_cosines_and_alignment():
    rng = np.random.default_rng(0)
    a, b = (np.linalg.qr(rng.normal(size=(30, 4)))[0] for _ in range(2))
    angles = np.linalg.svd(a.T @ b, compute_uv=False)
    np.testing.assert_allclose(spectral.principal_cosines(jnp.asarray(a), jnp.asarray(b)), angles, atol=1e-5)
    turned = a @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    aligned = spectral.align(jnp.asarray(turned, jnp.float32), jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(aligned, a, atol=1e-5)


def test_least_squares_fit_on_both_routes():
    """`fit` (Cholesky on CPU, conjugate gradients on TPU) against the documented objective in NumPy, condition 1e3."""
    x, _, _ = matrix(np.geomspace(1, 0.03, 12), 40, 12)
    gram, rng = x.T @ x, np.random.default_rng(1)
    moment, fallback = rng.normal(size=(5, 12)) @ gram, rng.normal(size=(5, 12))
    ridge = 100 * np.finfo(np.float32).eps * np.diag(np.diag(gram))
    want = (moment + fallback @ ridge) @ np.linalg.inv(gram + ridge)
    for route in (spectral.solve, spectral.solve_by_products):
        got = spectral.fit(*(jnp.asarray(a, jnp.float32) for a in (moment, gram, fallback)), route)
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_orthonormal_columns_on_both_routes():
    """The span is kept and columns are orthonormal, condition number 1e4; zero columns stay zero."""
    x, u, _ = matrix(np.geomspace(1, 1e-4, 8), 40, 8)
    x = np.hstack([x, np.zeros((40, 1))])
    for route in (spectral.orthonormal, spectral.orthonormal_by_products):
        got = np.float64(route(jnp.asarray(x, jnp.float32)))
        assert not got[:, 8].any() and off(got[:, :8]) < 1e-4
        assert distance(got[:, :8], u) < 5e-3


def test_batches_are_matrices_one_by_one():
    x = np.random.default_rng(0).normal(size=(2, 3, 9, 5)).astype(np.float32)
    for function in (polar, lambda y: svd(y)[1], jax.jit(spectral.orthonormal)):
        together = function(jnp.asarray(x))
        for i in range(2):
            for j in range(3):
                np.testing.assert_allclose(together[i, j], function(jnp.asarray(x[i, j])), atol=2e-5)
