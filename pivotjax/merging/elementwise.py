"""What methods that treat a tensor as one long vector share: sums, order statistics, election of signs.

All functions are for use inside a jitted kernel (except `cuts`, which calls one itself). They are shaped by what XLA's
CPU compiler does well: K experts are K arrays in a Python list, not one stack, so that a fused loop reads each once;
sums go over the last axis first, which is vectorised and shared among threads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging.updates import Array, Layout, Updates, is_traced

On = Literal["updates", "weights"]
Rescale = Literal["expected", "norm", "none"]


# The laws of methods that thin each update and then sum, or elect signs and average, what is left of them.
_ALWAYS = {"order": {}, "homogeneous": {}, "zero": {}, "idle": {}}
_WHOLE = {"density": 1.0, "scale": 1.0}
ELECTED_LAWS = {"identical": {"density": 1.0}, "single": {"density": 1.0}} | _ALWAYS
LINEAR_LAWS = {"identical": _WHOLE | {"normalize": True}, "average": _WHOLE | {"normalize": True}, "single": _WHOLE}
LINEAR_LAWS |= _ALWAYS


def each(updates: Updates, on: On = "updates") -> list[list[Array]]:
    """Each leaf's K updates (or weights), an array an expert."""
    bases = updates.base if on == "updates" and updates.has_base else [None] * len(updates.experts)
    return [[update_of(leaf[k], base, updates.dtype) for k in range(len(updates.names))]
            for leaf, base in zip(updates.experts, bases)]


def update_of(expert: Array, base: Array | None, dtype: Any) -> Array:
    """One expert's update of one leaf, in `dtype`; without a base its weights."""
    return expert.astype(dtype) - (0 if base is None else base.astype(dtype))


def by_expert(updates: Updates, value: float | Mapping[str, float]) -> list[float]:
    """An option that is one number, or one for each expert by name, as K numbers in the experts' order."""
    return [value[name] if isinstance(value, Mapping) else value for name in updates.names]


def input_axes(layout: Layout) -> list[int]:
    """The axis along which an output's entries lie, a leaf: -2 for a `kernel`, else the last."""
    kernels = {layer.weight for layer in layout.layers if layer.transposed}
    return [-2 if i in kernels else -1 for i in range(len(layout.paths))]


def vectors(layout: Layout) -> list[str]:
    """Paths of the leaves with a single axis (or none)."""
    return [path for path, shape in zip(layout.paths, layout.shapes) if len(shape) < 2]


def by_layer(layout: Layout, facts: Sequence[dict]) -> dict[str, dict]:
    """Facts for each leaf -> facts for each layer's label: those of its weight."""
    return {label: facts[layer.weight] for layer in layout.layers for label in layer.labels()}


def total(x: Array) -> Array:
    """The sum of all entries."""
    # The barrier keeps XLA from making one reduction of the two: a reduction to a scalar runs on one core.
    return jax.lax.optimization_barrier(x.sum(-1)).sum() if x.ndim else x


def inner(pieces: Sequence[Array]) -> Array:
    """Inner products `[K, K]` of K arrays as vectors."""
    count = len(pieces)
    products = {(i, j): total(pieces[i] * pieces[j]) for i in range(count) for j in range(i, count)}
    return jnp.array([[products[min(i, j), max(i, j)] for j in range(count)] for i in range(count)])


def divide(a: Array, b: Array) -> Array:
    """`a / b`, and `a` where b is 0."""
    return a / jnp.where(b == 0, 1, b)


def weighted(pieces: Sequence[Array], weight: Array) -> list[Array]:
    """`weight[k] * pieces[k]`."""
    return [w * piece for w, piece in zip(weight.astype(pieces[0].dtype), pieces)]


def fuse(pieces: Sequence[Array], weight: Array, elect: bool, normalize: bool) -> Array:
    """One update from K (sparse) ones.

    Args:
        pieces: K arrays of one shape.
        weight: `[K]`.
        elect: False: `sum_k weight_k pieces_k`, divided by the sum of the weights where `normalize`. True: TIES'
            election (arXiv 2306.01708): each entry keeps the experts whose sign is that of the weighted sum, and
            `normalize` divides by those experts' weights.
        normalize: see there.
    """
    values = weighted(pieces, weight)
    if not elect:
        return divide(sum(values), weight.sum().astype(values[0].dtype)) if normalize else sum(values)
    merged, share = agreeing(values, values, weight)
    return divide(merged, share) if normalize else merged


def agreeing(votes: Sequence[Array], values: Sequence[Array], weight: Array) -> tuple[Array, Array]:
    """The values and the weights of the experts whose vote has the sign of the sum of the votes, each summed."""
    sign = jnp.sign(sum(votes))
    agrees = [vote * sign > 0 for vote in votes]
    merged = sum(jnp.where(yes, value, 0) for yes, value in zip(agrees, values))
    share = sum(jnp.where(yes, w, 0) for yes, w in zip(agrees, weight.astype(merged.dtype)))
    return merged, share


def rescaled(update: Array, kept: Array, probability: Array, rescale: Rescale) -> Array:
    """The update where `kept`, else 0, rescaled.

    Args:
        update: of any shape.
        kept: its mask.
        probability: with which each entry was kept, for `expected`; broadcasts.
        rescale: `expected`: by 1 / probability; `norm`: by what restores the sum of magnitudes (1 where nothing is
            left); `none`: not.
    """
    if rescale == "expected":
        return jnp.where(kept, divide(update, probability.astype(update.dtype)), 0)
    thin = jnp.where(kept, update, 0)
    if rescale == "none":
        return thin
    left = total(jnp.abs(thin))
    return thin * jnp.where(left > 0, divide(total(jnp.abs(update)), left), 1)


def cuts(updates: Updates, counts: Sequence[Sequence[Sequence[int]]]) -> list[list[Array]]:
    """The `counts[leaf][expert]`-th largest magnitudes of each leaf of each update, `[m]` each.

    One expert at a time, by a program that all leaves of a shape share: nothing as large as the experts is kept, and a
    new model compiles nothing that it has compiled before.
    """
    bases = updates.base if updates.has_base else [None] * len(updates.experts)
    found: list[list[Array]] = []
    for leaf, base, count in zip(updates.experts, bases, counts):
        found.append([])
        for k in range(len(updates.names)):
            expert = leaf[k]
            if found[-1] and is_traced(expert):  # in one program, too: the next search waits for the one before
                expert, _ = jax.lax.optimization_barrier((expert, found[-1][-1]))
            found[-1].append(_cuts(expert, base, jnp.asarray(count[k]), updates.dtype))
    return found


@partial(jax.jit, static_argnums=3)
def _cuts(expert: Array, base: Array | None, counts: Array, dtype: Any) -> Array:
    return jnp.stack([largest(expert, count, base, dtype) for count in counts])


def largest(values: Array, count: Array, base: Array | None = None, dtype: Any = None) -> Array:
    """The `count`-th largest magnitude of `values - base` (any shape); infinity for a count of 0.

    Exact, and several times cheaper than a sort or a quickselect: floats that are not negative order as their bits do,
    so the answer's bits are searched, by counting the entries that reach each of five candidates. A sample says where
    to begin.

    Args:
        values: of any dtype.
        count: at most the number of entries.
        base: what they are measured from; None: 0.
        dtype: of the differences; None: that of `values`.
    """
    dtype, wanted = dtype or values.dtype, jnp.maximum(count, 1)
    given = [x for x in (values, base) if x is not None]
    # As words: XLA's CPU would widen 16-bit floats before the loops, and hold them twice as large.
    rows, word = [_in_rows(_bitcast(x, _word(x.dtype))) for x in given], _word(dtype)

    def bits(*words: Array) -> Array:
        parts = [_bitcast(held, x.dtype) for held, x in zip(words, given)]
        return _bitcast(jnp.abs(update_of(parts[0], parts[1] if base is not None else None, dtype)), word)

    def narrowed(bracket: _Bracket, candidates: Array) -> _Bracket:
        reached = _reaching(bits, rows, candidates)
        below = reached >= wanted  # the answer, that is, is not below the candidate
        return _Bracket(
            jnp.where(below, candidates, bracket.low).max(),
            jnp.where(below, bracket.high, candidates).min(),
            jnp.where(below, reached, bracket.reach_low).min(),
            jnp.where(below, bracket.reach_high, reached).max(),
        )

    top = _bitcast(jnp.array(jnp.inf, dtype), word) + jnp.ones((), word)
    whole = _Bracket(jnp.zeros((), word), top, jnp.array(values.size, jnp.int32), jnp.zeros((), jnp.int32))
    # Gathered: as a slice with a stride, TPU's compiler would hold all that it steps over in its vector memory.
    drawn = jnp.arange(0, values.size, max(1, values.size // _SAMPLE))
    sample = jnp.sort(bits(*(x.ravel()[drawn] for x in rows)))
    start = narrowed(whole, _first(sample, wanted / values.size))
    found = jax.lax.while_loop(
        lambda at: at.high - at.low > 1, lambda at: narrowed(at, _candidates(at, wanted, sample)), start
    )
    return jnp.where(count > 0, _bitcast(found.low, dtype), jnp.inf)


_bitcast = jax.lax.bitcast_convert_type


def _word(dtype: Any) -> Any:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


class _Bracket(NamedTuple):
    """The answer's bits lie in `low <= bits < high`; `reach_*` entries are at least as large as the ends."""

    low: Array
    high: Array
    reach_low: Array
    reach_high: Array


_SAMPLE = 1 << 12  # entries; more would take TPU's compiler long to sort


def _first(sample: Array, share: Array) -> Array:
    """Bits `[5]` around the smallest of the largest `share` of a sorted sample: it and its successor, four standard
    errors to both sides, 1."""
    size = len(sample)
    error = 4 * jnp.sqrt(share * (1 - share) / size)
    ranks = jnp.clip(jnp.stack([share + error, share, share - error]) * size + jnp.array([1, 0, -1]), 1, size)
    low, middle, high = sample[size - ranks.astype(jnp.int32)]
    return jnp.maximum(jnp.stack([low, middle, middle + 1, high, jnp.ones_like(low)]), 1)


def _candidates(at: _Bracket, count: Array, sample: Array) -> Array:
    """Bits `[5]` inside a bracket: two around the place that the counts at its ends suggest; the middle; the sample's
    entry at that place and its successor, which end the search where values repeat, as differences of 16-bit numbers
    do."""
    one, width = jnp.ones((), at.low.dtype), (at.high - at.low).astype(jnp.float32)
    between = (at.reach_low - at.reach_high).astype(jnp.float32)
    place = (at.reach_low - count).astype(jnp.float32) / between
    spread = jnp.clip(2 / jnp.sqrt(between), 1 / 64, 1 / 4)
    shares = jnp.clip(jnp.stack([place - spread, place + spread, jnp.float32(0.5)]), 0, 1)
    begin, end = jnp.searchsorted(sample, at.low + one), jnp.searchsorted(sample, at.high)
    drawn = sample[jnp.clip(begin + (place * (end - begin)).astype(begin.dtype), 0, len(sample) - 1)]
    steps = jnp.concatenate([(shares * width).astype(at.low.dtype), jnp.stack([drawn, drawn + one]) - at.low])
    return at.low + jnp.clip(steps, one, jnp.maximum(at.high - at.low - one, one))


_BITS, _MOST = 6, 63  # five counters in a word; none of them counts further than there are rows


def _in_rows(x: Array) -> Array:
    """`[rows, columns]` of all entries; filled up with zeros, which reach no candidate, where no good number of rows
    divides them: the copy costs as much as the search."""
    rows = next((rows for rows in range(_MOST, 15, -1) if x.size % rows == 0), _MOST)
    return jnp.pad(x.ravel(), (0, -x.size % rows)).reshape(rows, -1)


def _reaching(bits: Callable[..., Array], rows: Sequence[Array], candidates: Array) -> Array:
    """int32 `[5]`: how many entries reach each of five candidates, counted in one pass: a row after the other, every
    column with its counters in one word. XLA's own sum over an axis would be ten times as slow."""
    shifts = [_BITS * j for j in range(len(candidates))]

    def count(i: int, counters: Array) -> Array:
        row = bits(*(x[i] for x in rows))
        return counters + sum((row >= candidates[j]).astype(jnp.uint32) << shift for j, shift in enumerate(shifts))

    columns = jax.lax.fori_loop(0, len(rows[0]), count, jnp.zeros(rows[0].shape[1], jnp.uint32))
    return jnp.stack([((columns >> shift) & _MOST).astype(jnp.int32).sum() for shift in shifts])


def kept(share: float, size: int) -> int:
    """How many of `size` entries a share of them is: rounded down as mergekit does, but at least 1 unless it is 0."""
    return min(size, max(1, int(share * size))) if share > 0 else 0


def sizes(layout: Layout) -> list[int]:
    """Number of entries of each leaf."""
    return [int(np.prod(shape, dtype=int)) for shape in layout.shapes]
