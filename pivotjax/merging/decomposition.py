"""PivotMerge's first component: shared-space decomposition and filtering of updates. [ours], see `pivot`.

An expert's *effect* `E_k` is its update seen in the metric M of its layer's inputs, `E_k = D_k M^(1/2)`; without a
metric it is the update. On the output side no root is ever taken: all that is needed are inner products
`<a, b> = a M b'` of the rows of `U'D_k`, and what the filter does to a row is to mix it with that row of the others.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pivotjax.merging import spectral
from pivotjax.merging.spectral import Basis, inner, matmul, nonzero, summed, transpose

Array = jax.Array
Side = Literal["output", "input", "both"]
Residual = Literal["drop", "keep_mean", "keep"]
Conflict = Literal["none", "project", "elect"]
Gate = Literal["none", "hard", "soft"]
Grain = Literal["direction", "coordinate"]
Metric = Literal["pooled", "own"]

_MANY = 8  # a space of more than one in so many directions is worked on whole


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("energy", "tau", "gamma"),
    meta_fields=("side", "basis", "unit", "rank", "residual", "conflict", "gate", "grain", "metric"),
)
@dataclass(frozen=True)
class Filter:
    """The options of the decomposition (`pivot` documents them): words are static, numbers are traced."""

    side: Side
    basis: Basis
    unit: bool
    rank: int | None
    residual: Residual
    conflict: Conflict
    gate: Gate
    grain: Grain
    metric: Metric
    energy: float
    tau: float
    gamma: float


class Filtered(NamedTuple):
    """Filtered updates and what was found on the way; n matrices of one shape, r directions."""

    updates: Array  # D~_k, [K, n, d_out, d_in]
    spectrum: Array  # [n, r], of the side that carries the directions
    kept: Array  # bool [n, r]: inside the shared space
    consensus: Array  # [n, r]
    energy: Array  # [n, K]: share of each effect inside the space
    cosine: Array  # [n, K]: of each effect to the sum of the others'


class _Space(NamedTuple):
    """Bases, None where a side is not decomposed, and the masks of their kept directions."""

    left: Array | None  # [n, d_out, r]
    right: Array | None  # [n, d_in, r]
    spectrum: Array
    kept: Array

    def inside(self, effects: Array) -> Array:
        """Coefficients `[K, n, r, ...]`; a row is a direction. Rows outside the space are 0."""
        if self.left is None:
            return matmul(transpose(self.right), transpose(effects)) * self.kept[..., None]
        rows = matmul(transpose(self.left), effects) * self.kept[..., None]
        return rows if self.right is None else matmul(rows, self.right)

    def first(self, width: int) -> "_Space":
        """Only the first `width` of the directions whose rows `inside` gives."""
        left, right = self.left, self.right
        if left is None:
            right = right[..., :width]
        else:
            left = left[..., :width]
        return _Space(left, right, self.spectrum[..., :width], self.kept[..., :width])

    def back(self, rows: Array) -> Array:
        """The inverse of `inside` on the space."""
        if self.left is None:
            return transpose(matmul(self.right, rows))
        return matmul(self.left, rows if self.right is None else matmul(rows, transpose(self.right)))


def decompose(update: Array, gram: Array | None, shares: Array, options: Filter) -> Filtered:
    """Steps 1 to 3 of PivotMerge.

    Args:
        update: `[K, n, d_out, d_in]`.
        gram: second moments of the inputs `[K, n, d_in, d_in]`; None: no metric.
        shares: `[K]`, p_k, summing to 1.
        options: see `Filter`.
    """
    effects, metric, to_updates = _effects(update, gram, options)
    image = effects if metric is None else matmul(effects, metric)
    squares = jnp.maximum(inner(effects, image), 0)
    size = jnp.sqrt(squares)[..., None, None]
    if options.unit:
        effects, image, squares = effects / nonzero(size), image / nonzero(size), jnp.sign(squares)
    space = _shared_space(effects, image, options)
    act = partial(_act, effects, image, metric, shares, options)
    width = space.kept.shape[-1]
    few = max(1, width // _MANY)

    # Directions outside the space cost as much as those inside: where few are kept, only those are computed. Not for a
    # TPU, whose compiler would take half a minute longer.
    def as_few(space: _Space) -> tuple[Array, Array, Array]:
        fits = space.kept.sum(-1).max() <= few
        return jax.lax.cond(fits, lambda: _widened(act(space.first(few)), width), lambda: act(space))

    change, inside, consensus = jax.lax.platform_dependent(space, tpu=act, default=as_few)
    energy = inside / nonzero(squares).T
    change = change * size if options.unit else change
    # Only the change goes back to updates: what the filter leaves alone stays exact, inputs never seen too.
    updates = update + (change if to_updates is None else matmul(change, to_updates))
    return Filtered(updates, space.spectrum, space.kept, consensus, energy, _cosine(effects, image, squares))


def _act(
    effects: Array, image: Array, metric: Array | None, shares: Array, options: Filter, space: _Space
) -> tuple[Array, Array, Array]:
    """What the filter changes in the effects `[K, n, d_out, d_in]`, energies inside the space `[n, K]`, consensus
    `[n, r]`."""
    if metric is None:
        rows = partners = space.inside(effects)
    else:  # both at once: on TPU each matrix product costs seconds of compilation
        rows, partners = jnp.split(space.inside(jnp.concatenate([effects, image])), 2)
    products = _products(rows, partners)
    filtered, consensus = _filter(rows, products, metric, shares, options)
    change = space.back(filtered - rows)
    if options.residual != "keep":
        rest = effects - space.back(rows)
        change = change - rest + (spectral.mean(rest) if options.residual == "keep_mean" else 0)
    return change, jnp.diagonal(products.sum(1), axis1=-2, axis2=-1), consensus


def _widened(found: tuple[Array, Array, Array], width: int) -> tuple[Array, Array, Array]:
    """The consensus of directions outside the space is 0."""
    change, inside, consensus = found
    return change, inside, jnp.pad(consensus, ((0, 0), (0, width - consensus.shape[-1])))


def _effects(update: Array, gram: Array | None, options: Filter) -> tuple[Array, Array | None, Array | None]:
    """Effects, the metric M still to be applied in inner products (None: it is in the effects), and the way back."""
    if gram is None:
        return update, None, None
    if options.metric == "pooled" and options.side == "output":
        return update, spectral.mean(gram), None
    root, inverse = spectral.root(spectral.mean(gram)[None] if options.metric == "pooled" else gram)
    return matmul(update, root), None, inverse


def _shared_space(effects: Array, image: Array, options: Filter) -> _Space:
    left = right = None
    if options.side != "input":
        spectrum, left = spectral.shared_space(moment(effects, transpose(image), options.basis))
        kept = spectral.leading(spectrum, options.energy, options.rank)
    if options.side != "output":
        on_input, right = spectral.shared_space(moment(transpose(effects), effects, options.basis))
        also = spectral.leading(on_input, options.energy, options.rank)
        if left is None:
            spectrum, kept = on_input, also
        else:
            right = right * also[..., None, :]
    return _Space(left, right, spectrum, kept)


def moment(effects: Array, partners: Array, basis: Basis) -> Array:
    """The moment matrix whose eigenvectors are the shared directions, `[n, d, d]`, of `A_k = effects[k]`,
    `B_k = partners[k]`:

    `energy`: `sum_k A_k B_k`, for the left singular vectors of `[E_1 ... E_K]`, the largest together;
    `cross`: `sum_{j != k} A_j B_k`, what different experts have in common; a negative eigenvalue is a direction in
    which experts contradict each other. With one expert nothing is common and `energy` is meant;
    `average`: `(sum_k A_k)(sum_k B_k)`, for the left singular vectors of the mean effect.
    """
    if basis == "average":
        return matmul(summed(effects), summed(partners))
    if basis == "cross" and effects.shape[0] > 1:
        partners = summed(partners) - partners
    count, n, d, inner = effects.shape
    wide = jnp.moveaxis(effects, 0, 2).reshape(n, d, count * inner)
    return matmul(wide, jnp.moveaxis(partners, 0, 1).reshape(n, count * inner, d))


def _products(rows: Array, image: Array) -> Array:
    """Inner products of the experts' rows, direction by direction: `[n, r, K, K]`."""
    pairs = [[(a * b).sum(-1) for b in image] for a in rows]
    return jnp.moveaxis(jnp.array(pairs), (0, 1), (-2, -1))


def _filter(
    rows: Array, products: Array, metric: Array | None, shares: Array, options: Filter
) -> tuple[Array, Array]:
    """Conflicts and gate on rows `[K, n, r, ...]`; the consensus `[n, r]` that the gate sees."""
    if options.conflict == "project" and rows.shape[0] > 1:
        mix = _without_conflicts(products, shares)
        rows = jnp.stack([sum(mix[..., k, j, None] * rows[j] for j in range(len(rows))) for k in range(len(rows))])
        products = matmul(matmul(mix, products), transpose(mix))
    if options.conflict == "elect":
        rows = _elected(rows, shares)
        products = _products(rows, rows if metric is None else matmul(rows, metric))
    pattern = jnp.sqrt(jnp.maximum((shares[:, None] * shares * products).sum((-1, -2)), 0))
    sizes = jnp.sqrt(jnp.maximum(jnp.diagonal(products, axis1=-2, axis2=-1), 0))
    consensus = pattern / nonzero((shares * sizes).sum(-1))
    gated = consensus[..., None]
    if options.grain == "coordinate":
        pattern = jnp.tensordot(shares, rows, axes=1)
        gated = jnp.abs(pattern) / nonzero(jnp.tensordot(shares, jnp.abs(rows), axes=1))
    if options.gate == "hard":
        rows = rows * (gated >= options.tau)
    if options.gate == "soft":
        rows = rows * gated**options.gamma
    return rows, consensus


def _without_conflicts(products: Array, shares: Array) -> Array:
    """The mixing `[n, r, K, K]`, `c_k <- sum_j mix_kj c_j`, that removes from each row its component along the mean of
    the others where their inner product is negative."""
    identity = jnp.eye(len(shares), dtype=products.dtype)
    others = shares * (1 - identity) / (1 - shares)[:, None]
    toward = (others * products).sum(-1)  # <c_k, mean of the others>
    square = jnp.einsum("kj,...ji,ki->...k", others, products, others, precision="highest")
    return identity - (jnp.minimum(toward, 0) / nonzero(square))[..., None] * others


def _elected(rows: Array, shares: Array) -> Array:
    """TIES on the coefficients: entries against the sign of the sum are dropped, the others scaled up so that the mean
    over experts is the mean over those that agree."""
    weights = shares.reshape(-1, *[1] * (rows.ndim - 1))
    agrees = jnp.sign(rows) == jnp.sign(summed(weights * rows))
    return jnp.where(agrees, rows, 0) / nonzero(summed(weights * agrees))


def _cosine(effects: Array, image: Array, squares: Array) -> Array:
    """`[n, K]`: cosine of each effect to the sum of the others; `squares` are `<E_k, E_k>`, `[K, n]`."""
    total, image_total = summed(effects), summed(image)
    to_total = jnp.stack([inner(effect, image_total) for effect in effects])
    others = inner(total, image_total) - 2 * to_total + squares
    return ((to_total - squares) / nonzero(jnp.sqrt(jnp.maximum(squares * others, 0)))).T
