"""LiNeS: a merged update scaled by depth."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pivotjax.merging import settings
from pivotjax.merging.elementwise import by_layer, divide, each, total, weighted
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import ExpertValues, Merged, NotNegative, method
from pivotjax.merging.updates import Array, Updates


@method(
    "lines",
    family="elementwise",
    source="W0 + (alpha + beta l / (L - 1)) T in layer l of 0..L-1, T = sum_k w_k D_k, "
    "alpha = |sum_k D_k|_1 / |T|_1 / K (arXiv 2410.17146)",
    needs=("base",),
    scope="model",
    laws={
        "identical": {"beta": 0.0},
        "order": {},
        "homogeneous": {},
        "average": {"beta": 0.0},
        "single": {"beta": 0.0},
        "zero": {},
        "idle": {"alpha": 0.3},
    },
)
def lines(
    updates: Updates,
    *,
    alpha: NotNegative | None = None,
    beta: NotNegative = 0.5,
    weights: ExpertValues | None = None,
    scale: float = 1.0,
) -> Merged:
    """Task arithmetic whose factor grows with depth: early layers stay near the base.

    Layers are the numbered blocks of the tensors' names, counted for each kind of block alone (`layers.3.`,
    `linear_3/`). A tensor outside all blocks counts as first, as in the authors' code; with a single block the factor
    is alpha.

    Args:
        updates: K experts measured from their base.
        alpha: factor of the first layer; None: the formula, over all tensors together: 1 / K for weights of 1.
        beta: what the last layer gets on top. The paper searches it on validation data; the default is ours.
        weights: a factor for each expert by name; None: 1 each.
        scale: factor on the merged update.
    """
    if alpha is None and weights is None:
        alpha = 1 / len(updates.names)  # what the formula gives, without a pass over the updates
    leaves, factors = _lines(updates, expert_weights(updates, weights, normalize=False),
                             jnp.array(_depths(updates.layout.paths)), alpha, beta, scale)
    return Merged(leaves, by_layer(updates.layout, [{"factor": factor} for factor in factors]))


def _depths(paths: Sequence[str]) -> list[float]:
    """`l / (L - 1)` of each tensor's block, 0 outside of blocks and where L is 1."""
    blocks = [settings.block(path) or (None, 0) for path in paths]
    numbers = {kind: sorted({n for other, n in blocks if other == kind}) for kind, _ in blocks}
    return [numbers[kind].index(n) / max(len(numbers[kind]) - 1, 1) for kind, n in blocks]


@jax.jit
def _lines(
    updates: Updates, weight: Array, depths: Array, alpha: float | None, beta: float, scale: float
) -> tuple[list[Array], list[Array]]:
    leaves = each(updates)
    merged = [sum(weighted(leaf, weight)) for leaf in leaves]
    if alpha is None:
        summed, ours = (sum(total(jnp.abs(leaf)) for leaf in one) for one in (map(sum, leaves), merged))
        alpha = jnp.where(ours > 0, divide(summed, ours), 1) / len(updates.names)
    factors = [alpha + beta * depth for depth in depths]
    return [scale * factor * leaf for factor, leaf in zip(factors, merged)], factors
