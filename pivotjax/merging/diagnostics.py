"""What a merge looks like from inside, a layer: numbers for people, JSON-able."""

from collections.abc import Mapping

import jax
import numpy as np

from pivotjax.merging.spectral import matmul
from pivotjax.merging.updates import Updates, batched

_DIRECTIONS = 64  # so many leading directions go into a report


def describe(updates: Updates) -> dict[str, dict]:
    """How long the updates are and how they lie to each other.

    Returns:
        `{layer: {"update_norms": {expert: Frobenius norm}, "cosines": [K][K]}}`; a scanned stack has one entry a layer,
        `name[i]`. Without a base the updates are the weights.
    """
    inner = _inner_products(updates.layers)
    report = {}
    for layer in updates.layout.layers:
        for label, products in zip(layer.labels(), np.asarray(inner[layer.name], np.float64)):
            norms = np.sqrt(np.diag(products))
            cosines = products / np.maximum(np.outer(norms, norms), np.finfo(np.float32).tiny)
            report[label] = {
                "update_norms": by_expert(updates, norms),
                "cosines": [[float(c) for c in row] for row in cosines],
            }
    return report


@jax.jit
def _inner_products(layers: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`{layer: [K, n, d_out, d_in]}` -> `{layer: [n, K, K]}`."""

    def inner(update: jax.Array) -> jax.Array:
        flat = update.reshape(*update.shape[:2], -1).swapaxes(0, 1)
        return matmul(flat, flat.swapaxes(1, 2))

    return batched(inner, layers)


def by_expert(updates: Updates, values: np.ndarray) -> dict[str, float]:
    """`[K]` values -> `{expert: value}`."""
    return {name: float(value) for name, value in zip(updates.names, values)}


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
        host = {name: np.asarray(value, np.float64) for name, value in facts[layer.name].items()}
        for i, label in enumerate(layer.labels()):
            rank = int(host["kept"][i].sum())
            total = max(host["spectrum"][i].sum(), np.finfo(np.float32).tiny)
            report[label] = {
                "rank": rank,
                "spectrum": [float(v) for v in host["spectrum"][i][:_DIRECTIONS] / total],
                "consensus": [float(v) for v in host["consensus"][i][: min(rank, _DIRECTIONS)]],
                "energy_kept": float(host["energy"][i].mean()),
                "energy_kept_by_expert": by_expert(updates, host["energy"][i]),
                "weights": by_expert(updates, host["weights"][i]),
                "scores": by_expert(updates, host["scores"][i]),
                "rescale": float(host["factor"][i]),
            }
    return report
