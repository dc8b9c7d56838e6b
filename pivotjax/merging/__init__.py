"""Merging: pytrees of experts in, one merged pytree and a report out. No model is imported here.

`merge` is the one entry; a method is one registered function (`registry`), PivotMerge lives in `pivot`, the baselines
in `methods/`. Methods that need statistics of data get a `calibration` object (`calibration.Calibration`).
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging import diagnostics, pivot, registry, updates  # noqa: F401  importing a method registers it
from pivotjax.merging.calibration import Calibration
from pivotjax.merging.methods import average, regmean, task_arithmetic, ties  # noqa: F401
from pivotjax.merging.registry import METHODS, describe

PyTree = Any

__all__ = ["METHODS", "Calibration", "Merge", "describe", "merge"]


class Merge(NamedTuple):
    """A merged pytree (`params`) and what is worth knowing about the merge (`report`, JSON-able)."""

    params: PyTree
    report: dict[str, Any]


def merge(
    base: PyTree | None,
    experts: Mapping[str, PyTree] | Sequence[PyTree],
    method: str = "pivot",
    *,
    calibration: Calibration | None = None,
    **options: Any,
) -> Merge:
    """Merges K experts into one pytree of the same structure, shapes and dtypes.

    Args:
        base: the parameters all experts started from (updates are measured from them). None is allowed for methods
            that need no base: `average`, and `regmean` with `on="weights"`.
        experts: `{name: pytree}`, or a sequence (named `expert_0`, ...). Leaves are floating-point arrays; a `kernel`
            is `[..., d_in, d_out]`, a `weight` is `[..., d_out, d_in]`, a sibling `bias` belongs to it.
        method: a registered name; `describe()` lists them.
        calibration: statistics of calibration data, for methods and options that use them.
        **options: the method's own; unknown ones are refused. `lambda` may stand for `scale` (`**{"lambda": .5}`).

    Returns:
        Merge(params, report). Each leaf has the dtype of the base's (without a base: of the first expert's); leaves
        that came as NumPy arrays go back as NumPy arrays. All sums are float32 with highest precision, or float64 where
        the input is float64. The report holds the method, its resolved options and, a layer, its diagnostics.

    Raises:
        InputError: bad input: one line that names the expert and the leaf, or the option and the nearest known one.
    """
    chosen = registry.find(method)
    named = _named(experts)
    options = registry.resolve(chosen, options, tuple(named))
    if "base" in chosen.needs and base is None:
        raise InputError(f"merge method {method!r} measures updates from a base: give what the experts started from")
    if "calibration" in chosen.needs and calibration is None:
        raise InputError(f"merge method {method!r} needs calibration data; give it, or choose a method that needs none")
    extra = {"calibration": calibration} if chosen.takes_calibration else {}
    with _precision([base, *named.values()]):
        seen = updates.read(base, named)
        merged = chosen.function(seen, **extra, **options)
        params = _finish(seen, merged.leaves, base if base is not None else next(iter(named.values())))
        layers = diagnostics.describe(seen)
    for label, facts in merged.layers.items():
        layers[label] |= facts
    options = {**options, **merged.options}
    return Merge(params, {"method": method, "options": options, "experts": list(named), "layers": layers})


def _named(experts: Mapping[str, PyTree] | Sequence[PyTree]) -> dict[str, PyTree]:
    if isinstance(experts, Mapping):
        return {str(name): tree for name, tree in experts.items()}
    if isinstance(experts, Sequence):
        return {f"expert_{i}": tree for i, tree in enumerate(experts)}
    raise InputError(f"experts are a {type(experts).__name__}; give a mapping from names to pytrees, or a sequence")


def _precision(trees: Sequence[PyTree]) -> contextlib.AbstractContextManager:
    """Float64 arithmetic where some leaf is float64; JAX would otherwise round it to float32."""
    wide = any(getattr(leaf, "dtype", None) == np.float64 for leaf in jax.tree.leaves(list(trees)))
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _finish(seen: updates.Updates, merged: list[jax.Array], target: PyTree) -> PyTree:
    """Base + merged update, each leaf in the dtype and kind (NumPy or JAX) of the target's."""
    leaves = []
    for path, base, update, like in zip(seen.layout.paths, seen.base, merged, jax.tree.leaves(target)):
        leaf = (base + update).astype(like.dtype)
        if not bool(jnp.isfinite(leaf).all()):
            raise InputError(f"the merged leaf {path!r} overflows {leaf.dtype}; use a smaller scale or a wider dtype")
        leaves.append(np.asarray(leaf) if isinstance(like, np.ndarray) else leaf)
    return jax.tree_util.tree_unflatten(seen.layout.treedef, leaves)
