"""The caption loss: cross-entropy over the vocabulary in chunks, for a language model whose head is frozen."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Head(NamedTuple):
    """The matrix that makes logits of hidden states: `[D, vocab]`, or where `tied` the embedding `[vocab, D]`."""

    kernel: Float[Array, "D vocab"] | Float[Array, "vocab D"]
    tied: bool


def caption_nll(
    hidden: Float[Array, "*B T D"],
    head: Head,
    targets: Int[Array, "*B T"],
    weights: Float[Array, "*B T"],
    chunk: int,
) -> Float[Array, "*B"]:
    """Weighted sum over a row's T caption tokens of their negative log-likelihood, in nats, float32.

    Logits are made for at most `chunk` of a row's tokens at a time (all rows at once, so that rows spread over devices
    stay there), and their gradient is taken on the spot: no array of [tokens, vocab] exists, and the head is multiplied
    twice a token, once forward and once back, never again. The head itself gets no gradient.
    """
    return _nll(head.tied, chunk, hidden, head.kernel, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(tied, chunk, hidden, kernel, targets, weights):
    return _in_chunks(lambda *part: (_chunk_nll(tied, kernel, *part)[0],), chunk, hidden, targets, weights)[0].sum(-1)


def _nll_forward(tied, chunk, hidden, kernel, targets, weights):
    def one(hidden, targets, weights):
        nll, logits, log_sum = _chunk_nll(tied, kernel, hidden, targets, weights)
        slope = weights[..., None] * (jnp.exp(logits - log_sum) - _one_hot(targets, logits))
        back = "...v,vd->...d" if tied else "...v,dv->...d"
        kind = logits.dtype
        return nll, jnp.einsum(back, slope.astype(kernel.dtype), kernel, preferred_element_type=kind)

    nll, slopes = _in_chunks(one, chunk, hidden, targets, weights)
    return nll.sum(-1), slopes.astype(hidden.dtype)


def _nll_backward(tied, chunk, slopes, cotangent):
    return (cotangent[..., None, None] * slopes).astype(slopes.dtype), None, None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _chunk_nll(tied, kernel, hidden, targets, weights):
    """Weighted NLL `[*B, c]`, logits `[*B, c, vocab]` and their log-sum-exp `[*B, c, 1]`, at least float32."""
    kind = jnp.promote_types(hidden.dtype, jnp.float32)
    forth = "...d,vd->...v" if tied else "...d,dv->...v"
    logits = jnp.einsum(forth, hidden, kernel, preferred_element_type=kind)
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(_one_hot(targets, logits), logits, 0), axis=-1)  # no gather: the vocabulary may be cut
    return weights * (log_sum[..., 0] - picked), logits, log_sum


def _one_hot(targets, logits):
    return targets[..., None] == jnp.arange(logits.shape[-1])


def _in_chunks(function, chunk, *arrays):
    """`function` of at most `chunk` tokens (of every row) at a time; its results put together, `[*B, T, ...]`."""
    axis, length = arrays[1].ndim - 1, arrays[1].shape[-1]
    count = -(-length // chunk)
    size = -(-length // count)

    def cut(array):
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, count * size - length)
        array = jnp.pad(array, padding)
        return jnp.moveaxis(array.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :]), axis, 0)

    def join(array):
        array = jnp.moveaxis(array, 0, axis)
        joined = array.reshape(*array.shape[:axis], count * size, *array.shape[axis + 2 :])
        return jax.lax.slice_in_dim(joined, 0, length, axis=axis)

    _, results = jax.lax.scan(lambda _, part: (None, function(*part)), None, tuple(map(cut, arrays)))
    return tuple(map(join, results))
