"""Fisher merging: each parameter averaged by how sure each expert is of it."""

import jax
import jax.numpy as jnp

from pivotjax.errors import InputError
from pivotjax.merging.calibration import Calibration, own_fishers
from pivotjax.merging.diagnostics import by_expert
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import ExpertValues, Merged, Positive, method
from pivotjax.merging.updates import Array, Layer, Updates


@method(
    "fisher",
    family="calibrated",
    source="W = sum_k F_k W_k / sum_k F_k entry by entry, F_k = E[g^2] (arXiv 2111.09832)",
    needs=("calibration",),
    scope="model",
    laws={"identical": {}, "order": {}, "single": {}, "zero": {}},
)
def fisher(
    updates: Updates,
    *,
    calibration: Calibration,
    normalize: bool = False,
    floor: Positive = 1e-6,
    weights: ExpertValues | None = None,
    scale: float = 1.0,
) -> Merged:
    """Entrywise average of the experts, weighted by the diagonal of their Fisher information.

    Every entry of the result lies between the experts' entries, whatever the leaf's shape: no leaf is an exception.
    The report's `weights` are each expert's share `F_k / sum_j F_j`, averaged over a layer's entries.

    Args:
        updates: K experts; no base is needed.
        calibration: gives `F_k`, the mean squared gradient of the captions' log-likelihood, one gradient a pair, on
            expert k's own pairs. One that works on the host refuses to be traced.
        normalize: divide each `F_k` by its own mean over all entries, so that no expert counts more for larger
            gradients (the authors' code divides by the norm).
        floor: the smallest weight, relative: with m the mean of the `F_k` over all experts and entries (with
            `normalize`: of each expert's own), `F_k` becomes `max(F_k / m, floor)`. An entry in which all experts are
            below it is their average (by `weights`). The authors' code takes 1e-6 as it is, in the units of the loss.
        weights: a factor on each expert's floored `F_k` by name, at least 0; None: 1 each.
        scale: factor on the merged update; without a base there is none, and it must be 1.
    """
    if scale != 1 and not updates.has_base:
        raise InputError("fisher scales an update, which is measured from a base: give one, or leave scale at 1")
    if weights is not None and min(weights.values()) < 0:
        raise InputError("fisher divides by a sum of weights: give weights of at least 0")
    weight = expert_weights(updates, weights, normalize=True)
    fishers = own_fishers(calibration, updates)
    leaves, shares = _fisher(updates, fishers, weight, normalize, floor, scale)
    facts = {
        label: {"weights": by_expert(updates, share)}
        for layer in updates.layout.layers
        for label, share in zip(layer.labels(), shares[layer.name])
    }
    return Merged(leaves, facts)


@jax.jit
def _fisher(
    updates: Updates, fishers: list[Array], weight: Array, normalize: bool, floor: float, scale: float
) -> tuple[list[Array], dict[str, Array]]:
    """Merged leaves, and each expert's share a layer, `{layer: [n, K]}`."""
    fishers = [leaf.astype(updates.dtype) for leaf in fishers]
    entries = sum(leaf[0].size for leaf in fishers)
    own = sum(_row_sums(leaf).sum(-1) for leaf in fishers) / entries
    unit = jnp.where(normalize, own, own.mean())
    unit = jnp.where(unit > 0, unit, 1)
    importance = [
        [w.astype(leaf.dtype) * jnp.maximum(f / u, floor) for w, f, u in zip(weight, leaf, unit)] for leaf in fishers
    ]
    totals = [sum(each) for each in importance]
    merged = [
        scale * sum(i * d for i, d in zip(each, stacked)) / total
        for each, stacked, total in zip(importance, updates.stacked, totals)
    ]
    shares = {}
    for layer in updates.layout.layers:
        each, total = importance[layer.weight], totals[layer.weight]
        shares[layer.name] = jnp.stack([_layer_means(i / total, layer) for i in each], -1)
    return merged, shares


def _layer_means(leaf: Array, layer: Layer) -> Array:
    """`[*lead, rows, columns]` -> `[n]`."""
    return leaf.reshape(layer.count, *leaf.shape[-2:]).mean(-1).mean(-1)


def _row_sums(leaf: Array) -> Array:
    """`[K, ...]` -> `[K, rows]`: sums of the last axis alone, which all cores share."""
    return leaf.sum(-1).reshape(leaf.shape[0], -1) if leaf.ndim > 1 else leaf[:, None]
