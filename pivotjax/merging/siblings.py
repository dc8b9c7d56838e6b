"""Do experts look as if they had started from one initialisation?

Training moves weights, it does not exchange hidden units: where two experts share a start, unit i of one is most like
unit i of the other. Experts of different initialisations have their units in unrelated orders, and a merge of their
weights, measured from whatever base, mixes units that have nothing to do with each other.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

_UNITS = 512  # so many units, evenly spaced, are compared
_IN_PLACE = 0.5  # siblings have nearly all units in place, strangers one in `_UNITS`


def compare(first_layers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The test, on one layer of each expert.

    Units (outputs) of two experts are matched one to one so that the sum of `1 - cosine` of their rows is least (linear
    assignment). Of siblings, the best match of nearly every unit is the unit in its own place.

    Args:
        first_layers: `{expert: [d_out, d_in (+1)]}` of the first layer, at least two experts.

    Returns:
        "weight_cosines" and "update_cosines" `[K][K]` (updates measured from the experts' mean; alone they say little:
        K unrelated experts have -1 / (K - 1)); "pairs", with "in_place": the share of units whose match is in its own
        place, "cost_in_place" and "cost_matched": the mean `1 - cosine` of units in place, and matched; "alike":
        whether each pair has at least half of its units in place.
    """
    rows = {name: np.nan_to_num(np.asarray(layer, np.float32)) for name, layer in first_layers.items()}
    mean = sum(rows.values()) / len(rows)
    chosen = np.linspace(0, len(mean) - 1, min(_UNITS, len(mean)), dtype=int)
    units = {name: _unit_length(layer[chosen]) for name, layer in rows.items()}
    pairs = {f"{a}, {b}": _matched(units[a], units[b]) for a, b in combinations(units, 2)}
    return {
        "weight_cosines": _cosines([layer.ravel() for layer in rows.values()]),
        "update_cosines": _cosines([(layer - mean).ravel() for layer in rows.values()]),
        "pairs": pairs,
        "alike": all(pair["in_place"] >= _IN_PLACE for pair in pairs.values()),
    }


def _matched(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    cost = 1 - a @ b.T
    _, match = linear_sum_assignment(cost)
    place = np.arange(len(match))
    return {
        "in_place": float((match == place).mean()),
        "cost_in_place": float(cost[place, place].mean()),
        "cost_matched": float(cost[place, match].mean()),
    }


def _cosines(vectors: list[np.ndarray]) -> list[list[float]]:
    lengths = _unit_length(np.stack(vectors))
    return (lengths @ lengths.T).astype(float).tolist()


def _unit_length(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
