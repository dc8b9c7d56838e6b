"""What a merge looks like from inside, a layer: numbers for people, JSON-able."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging import spectral
from pivotjax.merging.spectral import matmul, nonzero, transpose
from pivotjax.merging.updates import Layer, Updates, batched

_ARRAY = object()  # stands in a report for an array that was taken out
_DIRECTIONS = 64  # so many leading directions go into a report
_EXACT = 1024  # up to this smaller side an eigenproblem costs little more than a range finder
_ITERATIONS = 4  # of the range finder beyond it
_ROWS = 64  # of a layer that the sign statistics take at once, so that they stay in the cache


def brief(updates: Updates, merged: list[jax.Array]) -> dict[str, dict]:
    """How long the updates are and how they lie to each other.

    Args:
        updates: the experts.
        merged: the merged update, a leaf each.

    Returns:
        `{layer: {"update_norms": {expert: Frobenius norm}, "cosines": [K][K]}}`, rows and columns in the order of
        `updates.names`; a scanned stack has one entry a layer, `name[i]`. Without a base the updates are the weights.
    """
    inner = _inner_products(updates)
    report = {}
    for layer in updates.layout.layers:
        for i, label in enumerate(layer.labels()):
            products = inner[layer.name][i]
            norms = jnp.sqrt(jnp.diagonal(products))
            cosines = products / jnp.maximum(norms[:, None] * norms, jnp.finfo(jnp.float32).tiny)
            report[label] = {"update_norms": by_expert(updates, norms), "cosines": cosines}
    return report


def full(updates: Updates, merged: list[jax.Array]) -> dict[str, dict]:
    """Everything worth knowing of a layer's updates `D_k` and of their merged update `M`, whatever the method was.

    `M` is measured as the method made it: with its scale, before it is rounded to the checkpoint's dtype. Quotients
    whose denominator is 0 (an expert equal to the base) have a denominator of 1.

    Args:
        updates: K experts.
        merged: the merged update, a leaf each.

    Returns:
        `{layer: facts}` as `brief`. Lists over directions hold the leading r = min(64, d_out, d_in). Facts:

        - "shape" `[d_out, d_in]`, the bias as one more input.
        - "update_norms" `{expert: |D_k|}` (Frobenius) and "cosines" `[K][K]`, `<D_j, D_k> / (|D_j| |D_k|)`.
        - "singular_values" `{expert: [r]}`, descending. Exact where the smaller side of the layer is at most 1024;
          beyond it a randomized range finder with 4 subspace iterations (Halko, Martinsson, Tropp 2011): within
          1e-4 of the largest value for spectra that fall off like 1/i, 5 % of it low on flat ones (white noise).
        - "effective_rank" `{expert: x}`, the participation ratio `(sum_i s_i^2)^2 / sum_i s_i^4` over *all* singular
          values (from `|D_k|^4 / |D_k D_k'|^2`): n for n equal values, 1 for one.
        - "subspace_overlap" `{"left" | "right": {"a & b": [q]}}`: cosines of the principal angles between the leading q
          singular directions of two experts, left (outputs) and right (inputs, the bias as one), descending;
          q = min(64, min(d_out, d_in) // 4, at least 1). Two random spaces have a mean squared cosine of q / d.
        - "sign_conflicts": "pairs" `[K][K]`, the share of entries at which two experts' signs are opposite, among those
          where neither is 0; "weighted_pairs", the same with entries weighted by `|D_j D_k|`, which is
          `(1 - <D_j, D_k> / <|D_j|, |D_k|>) / 2`; "share", the share of entries at which not all experts that differ
          from 0 have one sign, among those where some expert does; "weighted", the same weighted by `sum_k |D_k|`.
          Unrelated experts: 1/2 a pair, `1 - 2^(1 - K)` overall.
        - "shared_directions": along the left singular vectors `u_i` of `[D_1 ... D_K]` (the joint energy space, found
          like the singular values) with `c_ki = u_i' D_k`: "singular_values" `[r]` of `[D_1 ... D_K]` and "consensus"
          `[r]`, `|mean_k c_ki| / mean_k |c_ki|`: 1 where all agree, about `1 / sqrt(K)` where they are unrelated.
        - "merge": of M, "norm", "singular_values" `[r]`, "effective_rank", "distance" `{expert: |M - D_k| / |D_k|}` and
          "cosine" `{expert: <M, D_k> / (|M| |D_k|)}`.

        One expert alone has no pairs and no conflicts.
    """
    pairs = [f"{a} & {b}" for a, b in combinations(updates.names, 2)]
    report = {}
    for group, found in zip(updates.layout.groups, _facts(updates, merged)):
        labels = [(layer, label) for layer in group for label in layer.labels()]
        for i, (layer, label) in enumerate(labels):
            facts = jax.tree.map(lambda leaf, i=i: leaf[i], found)
            for key in ("update_norms", "singular_values", "effective_rank"):
                facts[key] = by_expert(updates, facts[key])
            for key in ("distance", "cosine"):
                facts["merge"][key] = by_expert(updates, facts["merge"][key])
            facts["subspace_overlap"] = {side: dict(zip(pairs, c)) for side, c in facts["subspace_overlap"].items()}
            report[label] = {"shape": list(layer.matrix_shape), **facts}
    return {label: report[label] for layer in updates.layout.layers for label in layer.labels()}


Facts = dict[str, Any]  # arrays, nested


@jax.jit
def _facts(updates: Updates, merged: list[jax.Array]) -> list[Facts]:
    """Facts `[n, ...]` of the n matrices of each of the layout's groups. They stay together: a program that returns
    each matrix' facts alone takes minutes to compile for the layers of a whole model.

    By `lax.map` over matrices, experts and pairs, not batched: the intermediates of one are in memory at a time, and no
    LAPACK call has a batch. Two batched ones in one program can wait for each other for ever, each inside a thread of
    XLA's pool on the CPU (jaxlib 0.10).
    """
    leaves = tuple(leaf.astype(updates.dtype)[None] for leaf in merged)
    experts, merge = updates.layers, Updates(("merged",), updates.layout, None, leaves).layers

    def of(group: list[Layer]) -> Facts:
        update, one = (jnp.concatenate([seen[layer.name] for layer in group], 1) for seen in (experts, merge))
        return jax.lax.map(lambda pair: _matrix_facts(*pair), (update.swapaxes(0, 1), one[0]))

    return [of(group) for group in updates.layout.groups]


def _matrix_facts(update: jax.Array, merged: jax.Array) -> Facts:
    """`full` in arrays, of one matrix: updates `[K, d_out, d_in]`, merged `[d_out, d_in]`."""
    left, sizes, right = jax.lax.map(_leading, update)
    signs, inner = _signs(update)
    norms, length = jnp.sqrt(jnp.diagonal(inner)), jnp.sqrt(_total(merged * merged))
    return {
        "update_norms": norms,
        "cosines": inner / nonzero(norms[:, None] * norms),
        "singular_values": sizes,
        "effective_rank": _effective_rank(update),
        "subspace_overlap": {"left": _overlaps(left, update), "right": _overlaps(right, update)},
        "sign_conflicts": signs,
        "shared_directions": _shared_directions(update),
        "merge": {
            "norm": length,
            "singular_values": _leading(merged)[1],
            "effective_rank": _effective_rank(merged),
            "distance": jnp.sqrt(_total((merged - update) ** 2)) / nonzero(norms),
            "cosine": _total(merged * update) / nonzero(norms * length),
        },
    }


def _leading(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading singular triplets of `[m, n]`; columns of directions without size are 0 on both sides."""
    rank = min(_DIRECTIONS, *x.shape)
    exact = min(x.shape) <= _EXACT
    left, sizes, right = spectral.svd(x, rank) if exact else spectral.randomized(x, rank, iterations=_ITERATIONS)
    return left * (sizes > 0), sizes, right * (sizes > 0)


def _effective_rank(x: jax.Array) -> jax.Array:
    """`(sum_i s_i^2)^2 / sum_i s_i^4` of `[..., m, n]`; 0 for a matrix of zeros."""
    small = x if x.shape[-2] <= x.shape[-1] else transpose(x)
    square = _total(x * x)
    return jnp.where(square > 0, 1 / nonzero(_gram_square(small, 1 / nonzero(square))), 0)


def _gram_square(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`|scale X X'|^2` of `[..., m, n]`, by blocks of rows: X X' is symmetric, so that 10 of 16 are enough."""
    rows = jnp.array_split(x, 4, axis=-2)
    total = jnp.zeros(x.shape[:-2], x.dtype)
    for i, j in combinations_with_replacement(range(4), 2):
        block = scale[..., None, None] * matmul(rows[i], transpose(rows[j]))
        total += (1 if i == j else 2) * _total(block * block)
    return total


def _overlaps(basis: jax.Array, update: jax.Array) -> jax.Array:
    """Cosines of principal angles between the leading directions `[K, d, r]` of each pair of experts, `[pairs, q]`."""
    experts, (d_out, d_in) = basis.shape[0], update.shape[1:]
    leading = min(basis.shape[-1], max(1, min(d_out, d_in) // 4))
    if experts == 1:
        return jnp.zeros((0, leading), basis.dtype)
    spaces, pairs = basis[..., :leading], jnp.array(list(combinations(range(experts), 2)))
    return jax.lax.map(lambda pair: spectral.principal_cosines(spaces[pair[0]], spaces[pair[1]]), pairs)


def _shared_directions(update: jax.Array) -> Facts:
    """Spectrum and consensus along the leading left singular vectors of `[D_1 ... D_K]`."""
    side_by_side = update.swapaxes(0, 1).reshape(update.shape[1], -1)
    basis, sizes, _ = _leading(side_by_side)
    coefficients = matmul(transpose(basis), update)
    size = spectral.norm(coefficients, -1).mean(0)
    return {"singular_values": sizes, "consensus": spectral.norm(coefficients.mean(0), -1) / nonzero(size)}


def _signs(update: jax.Array) -> tuple[Facts, jax.Array]:
    """Sign conflicts of `[K, d_out, d_in]`, and the inner products `[K, K]`; both from one pass over groups of rows."""
    experts, d_out, d_in = update.shape
    padded = jnp.pad(update, ((0, 0), (0, -d_out % _ROWS), (0, 0)))  # zeros count nowhere
    found = jax.lax.map(_signs_of_rows, padded.reshape(experts, -1, _ROWS, d_in).swapaxes(0, 1))
    found = {key: counts.sum(0) for key, counts in found.items()}
    inner, sizes, signs, filled = found["products"]
    alone = jnp.eye(experts, dtype=bool)
    mixed, seen, mixed_size, size = found["mixed"]
    return {
        "share": mixed / nonzero(seen),
        "weighted": mixed_size / nonzero(size),
        "pairs": jnp.where(alone, 0, (filled - signs) / (2 * nonzero(filled))),
        "weighted_pairs": jnp.where(alone, 0, (sizes - inner) / (2 * nonzero(sizes))),
    }, inner


def _signs_of_rows(rows: jax.Array) -> dict[str, jax.Array]:
    """Sums over some rows `[K, rows, d_in]`: "products" `[4, K, K]`, inner products of entries, magnitudes, signs and
    presence; "mixed" `[4]`, entries with both signs, entries at all, and the magnitudes in them."""
    flat = rows.reshape(rows.shape[0], -1)
    size, sign = jnp.abs(flat), jnp.sign(flat)
    views = (flat, size, sign, jnp.abs(sign))
    mixed, seen, total = (flat.max(0) > 0) & (flat.min(0) < 0), size.max(0) > 0, size.sum(0)
    counts = [mixed.sum(dtype=flat.dtype), seen.sum(dtype=flat.dtype), (mixed * total).sum(), total.sum()]
    return {"products": jnp.stack([matmul(view, view.T) for view in views]), "mixed": jnp.stack(counts)}


def _total(x: jax.Array) -> jax.Array:
    """Sum over the last two axes, in rows first, so that threads share the work."""
    return x.sum(-1).sum(-1)


@jax.jit
def _inner_products(updates: Updates) -> dict[str, jax.Array]:
    """`{layer: [n, K, K]}`."""

    def inner(update: jax.Array) -> jax.Array:
        flat = update.reshape(*update.shape[:2], -1).swapaxes(0, 1)
        return matmul(flat, flat.swapaxes(1, 2))

    return batched(inner, updates.layers)


def parted(report: Mapping[str, Any]) -> tuple[list[jax.Array], dict[str, Any]]:
    """The arrays of a traced report, for its program to return, and the rest, which the trace knows; see `joined`."""
    arrays: list[jax.Array] = []

    def rest(value: Any) -> Any:
        if isinstance(value, jax.Array):
            arrays.append(value)
            return _ARRAY
        return _mapped(rest, value)

    return arrays, rest(report)


def joined(arrays: Sequence[Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The report that `parted` took apart, with the arrays that a program returned; names stay in their order."""
    given = iter(arrays)

    def whole(value: Any) -> Any:
        return next(given) if value is _ARRAY else _mapped(whole, value)

    return whole(rest)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of what a dict or list holds; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: function(one) for key, one in value.items()}
    return [function(one) for one in value] if isinstance(value, (list, tuple)) else value


def plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with JAX's arrays and scalars as lists and numbers, for JSON; consensus of the kept directions alone.

    Layers and experts stay in their order, which JAX would make that of their names.
    """
    arrays, rest = parted(report)
    host = _plain(joined(jax.device_get(arrays), rest))
    for facts in host.get("layers", {}).values():
        if "consensus" in facts and "rank" in facts:
            facts["consensus"] = facts["consensus"][: facts["rank"]]
    return host


def _plain(value: Any) -> Any:
    """Float32 becomes the shortest decimal that stands for it: .1, not .10000000149011612."""
    if hasattr(value, "tolist"):
        return (value.astype(str).astype(float) if value.dtype == np.float32 else value).tolist()
    return _mapped(_plain, value)


def by_expert(updates: Updates, values: jax.Array) -> dict[str, jax.Array]:
    """`[K]` values -> `{expert: value}`."""
    return dict(zip(updates.names, values))


def shared_space(updates: Updates, facts: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, dict]:
    """What a shared-space method found, from arrays to reports.

    Args:
        updates: the experts.
        facts: `{layer: {"spectrum": [n, d_out], "kept": bool [n, d_out], "consensus": [n, d_out], "energy": [n, K],
            "weights": [n, K], "scores": [n, K], "factor": [n]}}`.

    Returns:
        `{layer label: {...}}` with "rank", "spectrum" (shares of its sum), "consensus" (both of the first 64
        directions; consensus of the kept ones only), "energy_kept" (share of the experts' energy inside the
        space, mean and by expert), "weights" and "scores" by expert, "rescale" (the factor on the merged update).
    """
    report = {}
    for layer in updates.layout.layers:
        found = facts[layer.name]
        for i, label in enumerate(layer.labels()):
            spectrum, kept = found["spectrum"][i], found["kept"][i]
            total = jnp.maximum(spectrum.sum(), jnp.finfo(jnp.float32).tiny)
            report[label] = {
                "rank": kept.sum(),
                "spectrum": spectrum[:_DIRECTIONS] / total,
                "consensus": jnp.where(kept, found["consensus"][i], 0)[:_DIRECTIONS],
                "energy_kept": found["energy"][i].mean(),
                "energy_kept_by_expert": by_expert(updates, found["energy"][i]),
                "weights": by_expert(updates, found["weights"][i]),
                "scores": by_expert(updates, found["scores"][i]),
                "rescale": found["factor"][i],
            }
    return report
