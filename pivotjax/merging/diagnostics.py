"""What a merge looks like from inside, a layer: numbers for people, JSON-able."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pivotjax.merging.spectral import matmul
from pivotjax.merging.updates import Updates, batched

_DIRECTIONS = 64  # so many leading directions go into a report


def brief(updates: Updates, merged: list[jax.Array]) -> dict[str, dict]:
    """How long the updates are and how they lie to each other.

    Args:
        updates: the experts.
        merged: the merged update, a leaf each.

    Returns:
        `{layer: {"update_norms": {expert: Frobenius norm}, "cosines": [K][K]}}`; a scanned stack has one entry a layer,
        `name[i]`. Without a base the updates are the weights.
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
    return brief(updates, merged)


@jax.jit
def _inner_products(updates: Updates) -> dict[str, jax.Array]:
    """`{layer: [n, K, K]}`."""

    def inner(update: jax.Array) -> jax.Array:
        flat = update.reshape(*update.shape[:2], -1).swapaxes(0, 1)
        return matmul(flat, flat.swapaxes(1, 2))

    return batched(inner, updates.layers)


def plain(report: Mapping[str, Mapping]) -> dict[str, dict]:
    """Arrays and scalars of JAX as lists and numbers, for JSON; consensus of the kept directions alone."""
    host = jax.tree.map(lambda leaf: leaf.tolist() if hasattr(leaf, "tolist") else leaf, jax.device_get(dict(report)))
    for facts in host.values():
        if "consensus" in facts:
            facts["consensus"] = facts["consensus"][: facts["rank"]]
    return host


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
