"""SCE: select what varies, weigh by energy, erase minority signs."""

import jax
import jax.numpy as jnp

from pivotjax.merging.diagnostics import by_expert
from pivotjax.merging.elementwise import agreeing, by_layer, divide, each, largest, sizes, total, weighted
from pivotjax.merging.registry import Fraction, Merged, NotNegative, method
from pivotjax.merging.updates import Array, Updates


@method(
    "sce",
    family="elementwise",
    source="keep the entries of largest variance over the experts, w_k = |D_k|^2 / sum_j |D_j|^2, drop minority signs, "
    "weighted mean (FuseChat, arXiv 2408.07990; the mean over the agreeing experts as in mergekit)",
    needs=("base",),
    scope="tensor",
    laws={"identical": {"select": 1.0}, "order": {}, "homogeneous": {}, "single": {"select": 1.0}, "zero": {}},
)
def sce(updates: Updates, *, select: Fraction = 0.1, floor: NotNegative = 0.0, scale: float = 1.0) -> Merged:
    """Select, calculate, erase, tensor by tensor.

    Args:
        updates: K experts measured from their base.
        select: share of the entries that is kept: those whose variance over the experts is largest, counted among
            the entries that vary at all (so identical experts, or one, keep nothing); entries that vary as much
            as a kept one are kept too. 1: all entries are kept, whether they vary or not.
        floor: where the mean squares of the selected updates sum to no more than this, all experts weigh the same.
            mergekit has 1e-6, which updates of fine-tuned models often do not reach; 0: only where all are 0.
        scale: lambda, on the merged update.
    """
    counts = [int(select * size) for size in sizes(updates.layout)] if select < 1 else None
    leaves, energies = _sce(updates, counts, select, floor, scale)
    return Merged(leaves, by_layer(updates.layout, [{"weights": by_expert(updates, w)} for w in energies]))


@jax.jit
def _sce(
    updates: Updates, counts: list[int] | None, select: float, floor: float, scale: float
) -> tuple[list[Array], list[Array]]:
    leaves, energies = [], []
    for i, leaf in enumerate(each(updates)):
        if counts is not None:
            chosen = _selected(leaf, counts[i], select)
            leaf = [jnp.where(chosen, d, 0) for d in leaf]
        energy = jnp.stack([total(jnp.square(d)) / d.size for d in leaf])
        weight = jnp.where(energy.sum() > floor, divide(energy, energy.sum()), 1 / len(leaf))
        merged, share = agreeing(leaf, weighted(leaf, weight), weight)
        leaves.append(scale * divide(merged, share))
        energies.append(weight)
    return leaves, energies


def _selected(leaf: list[Array], count: Array, select: Array) -> Array:
    """Which entries vary most; `count` of them where all vary (in whole numbers: float32 cannot count them)."""
    shifted = [d - leaf[0] for d in leaf]  # exactly 0 where the experts are equal
    mean = sum(shifted) / len(leaf)
    variance = sum(jnp.square(d - mean) for d in shifted) / len(leaf)
    varying = total((variance > 0).astype(jnp.int32))
    fewer = jnp.floor(select * varying + 1e-6).astype(jnp.int32)
    threshold = largest(variance, jnp.where(varying == variance.size, count, fewer))
    return (variance >= threshold) & (variance > 0)
