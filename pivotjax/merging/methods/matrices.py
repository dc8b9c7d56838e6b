"""What the methods on a layer's matrix share: batching over layers, the average of everything else, the report.

These methods decompose the weight alone. Biases, norms and other leaves that are no layer's weight are averaged
(`Merged.exceptions` names them): a vector has no singular directions.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pivotjax.merging import spectral
from pivotjax.merging.diagnostics import by_expert
from pivotjax.merging.elementwise import agreeing, divide, largest
from pivotjax.merging.registry import Merged
from pivotjax.merging.updates import Array, Updates, batched, leaves_from

_ROUNDING = 1e-4  # of the smallest kept entry: what is equal but for rounding is kept or dropped together
Facts = dict[str, Array]  # [n] numbers, or [n, K] with one for each expert


def merge_kernels(
    updates: Updates, one: Callable[..., tuple[Array, Facts]], scale: float, *extra: Mapping[str, Array]
) -> tuple[list[Array], dict[str, Facts]]:
    """Merges every layer's weight by `one`, averages the rest; for use under `jax.jit`.

    Args:
        updates: K experts.
        one: takes the updates `[K, n, d_out, d_in]` of n matrices (and `extra`'s arrays for them); returns the merged
            update `[n, d_out, d_in]` and facts for the report.
        scale: factor on all leaves.
        *extra: `{layer: [K, n, ...]}`.

    Returns:
        The merged update, an array a leaf, and `{layer: facts}`.
    """
    found = batched(one, updates.kernels, *extra)
    matrices = {name: matrix for name, (matrix, _) in found.items()}
    leaves = leaves_from(updates.layout, matrices, updates.vectors_mean())
    return [scale * leaf for leaf in leaves], {name: facts for name, (_, facts) in found.items()}


def merged(updates: Updates, leaves: list[Array], facts: Mapping[str, Facts]) -> Merged:
    """What `merge_kernels` found as a method's result."""
    layout = updates.layout
    layers = {
        label: {key: by_expert(updates, value[i]) if value.ndim > 1 else value[i]
                for key, value in facts[layer.name].items()}
        for layer in layout.layers for i, label in enumerate(layer.labels())
    }  # fmt: skip
    vectors = [path for i, path in enumerate(layout.paths) if i not in layout.weights]
    return Merged(leaves, layers, {}, dict.fromkeys(vectors, "averaged: not a matrix"))


def total(fn: Callable[..., Array], *stacked: Array) -> Array:
    """`sum_k fn(x_k, ...)` over the leading axis, one term at a time: memory for one, not for K."""
    like = jax.eval_shape(fn, *(x[0] for x in stacked))
    start = jnp.zeros(like.shape, like.dtype)
    return jax.lax.scan(lambda so_far, xs: (so_far + fn(*xs), None), start, stacked)[0]


def side_by_side(blocks: Array) -> Array:
    """`[K, n, m, r]` -> `[n, m, K r]`: the blocks of all experts next to each other."""
    count, n, m, r = blocks.shape
    return blocks.transpose(1, 2, 0, 3).reshape(n, m, count * r)


def left_directions(x: Array) -> Array:
    """The left singular vectors of `[..., m, n]`, descending: `[..., m, min(m, n)]`; `u' x` has orthogonal rows of
    length sigma. Cheaper than `spectral.svd` where m <= n, and as accurate there as the Gram matrix allows."""
    if x.shape[-2] <= x.shape[-1]:
        return spectral.eigh(spectral.matmul(x, spectral.transpose(x)))[1]
    return spectral.svd(x)[0]


def polars(left: Array, right: Array) -> tuple[Array, Array]:
    """`spectral.polar` of both; of square layers in one program, half as long to compile."""
    if left.shape != right.shape:
        return spectral.polar(left), spectral.polar(right)
    both = spectral.polar(jnp.stack([left, right]))
    return both[0], both[1]


def single_rank(shape: tuple[int, ...], count: int) -> int:
    """How many directions each of `count` experts gets in a matrix: an equal share of min(m, n), at least one."""
    return max(1, min(shape[-2:]) // count)


def elected(entries: Array, count: Array | int | None = None) -> tuple[Array, Array]:
    """TIES on `[K, n, p, q]`: the mean of the entries whose sign is that of the experts' sum, `[n, p, q]`.

    Args:
        entries: of K experts in n matrices.
        count: an expert keeps so many of a matrix's entries, by magnitude (one number, or `[n]`), and all that are as
            large as the smallest of them, to 1e-4 of it. None: all.

    Returns:
        The mean, and how many entries that are not 0 were kept, `[n, K]`.
    """
    pieces = list(entries)
    if count is not None:
        counts = jnp.broadcast_to(count, entries.shape[1:2])
        pieces = [_trimmed(piece, counts) for piece in pieces]
    summed, experts = agreeing(pieces, pieces, jnp.ones(len(pieces)))
    kept = jnp.stack([(piece != 0).sum(-1).sum(-1) for piece in pieces], -1)
    return divide(summed, experts), kept


def _trimmed(piece: Array, counts: Array) -> Array:
    """The largest `counts[i]` entries of each `[n, p, q]`, and those equal to the smallest of them."""
    size = jnp.abs(piece)
    smallest = jax.vmap(largest)(size, counts)[:, None, None]
    return jnp.where(size >= (1 - _ROUNDING) * smallest, piece, 0)
