"""The chunked cross-entropy: log softmax's numbers and gradient, without ever holding all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivotjax.training.losses import Head, caption_nll

LEADING, LENGTH, WIDTH, VOCABULARY = (2, 3), 7, 6, 40


def inputs(tied, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(*LEADING, LENGTH, WIDTH)), dtype)
    kernel = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, (*LEADING, LENGTH)))
    weights = jnp.asarray(rng.integers(0, 2, (*LEADING, LENGTH)), jnp.float32)
    return hidden, Head(kernel, tied), targets, weights


def plain(hidden, head, targets, weights):
    logits = hidden @ (head.kernel.T if head.tied else head.kernel)
    log = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(weights * jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0]).sum(-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_it_is_the_cross_entropy(tied, chunk):
    hidden, head, targets, weights = inputs(tied)
    slope = jnp.arange(1.0, 7.0).reshape(LEADING)
    expected, back = jax.vjp(lambda h: plain(h, head, targets, weights), hidden)
    found, chunked_back = jax.vjp(lambda h: caption_nll(h, head, targets, weights, chunk), hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(caption_nll(hidden, head, targets, weights, chunk), expected, rtol=1e-6)
    gradient = back(slope)[0]
    np.testing.assert_allclose(chunked_back(slope)[0], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max())


def test_bfloat16_is_added_in_float32():
    hidden, head, targets, weights = inputs(False, jnp.bfloat16)
    wide = plain(hidden.astype(jnp.float32), Head(head.kernel.astype(jnp.float32), False), targets, weights)
    found, back = jax.vjp(lambda h: caption_nll(h, head, targets, weights, 2), hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide, rtol=1e-5)
    assert back(jnp.ones(LEADING))[0].dtype == jnp.bfloat16


def sizes(jaxpr):
    """The number of entries of every array in a jaxpr, loop bodies included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for value in equation.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from sizes(sub)


@pytest.mark.parametrize("chunk, most", [(2, 2), (7, 7)])
def test_no_more_logits_than_a_chunk(chunk, most):
    hidden, head, targets, weights = inputs(False)
    value = jax.value_and_grad(lambda h: caption_nll(h, head, targets, weights, chunk).sum())
    rows = int(np.prod(LEADING))
    assert max(sizes(jax.make_jaxpr(value)(hidden).jaxpr)) == rows * most * VOCABULARY
