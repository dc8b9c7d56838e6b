"""Merging: pytrees of experts in, one merged pytree and a report out. No model is imported here.

`merge` is the one entry; a method is one registered function (`registry`), PivotMerge lives in `pivot`, the baselines
in `methods/`. Methods that need statistics of data get a `calibration` object (`calibration.Calibration`).
"""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging import diagnostics, methods, pivot, registry, settings, updates  # noqa: F401  pivot registers
from pivotjax.merging.calibration import Calibration
from pivotjax.merging.registry import METHODS, Merged, Method, describe
from pivotjax.merging.updates import Stacked, Updates

PyTree = Any

__all__ = ["METHODS", "Calibration", "Merge", "Stacked", "describe", "merge"]


class Merge(NamedTuple):
    """A merged pytree (`params`) and what is worth knowing about the merge (`report`, JSON-able)."""

    params: PyTree
    report: dict[str, Any]


def merge(
    base: PyTree | None,
    experts: Mapping[str, PyTree] | Sequence[PyTree] | Stacked,
    method: str = "pivot",
    *,
    calibration: Calibration | None = None,
    platform: Literal["cpu", "tpu"] | None = None,
    diagnose: Literal["nothing", "brief", "full"] = "brief",
    **options: Any,
) -> Merge:
    """Merges K experts into one pytree of the same structure, shapes and dtypes.

    May be called inside `jax.jit` (or pmap, shard_map) as part of a larger program: shapes and options are checked as
    ever, values (NaN, overflow) are not, and the report holds traced arrays where it would hold numbers.

    Args:
        base: the parameters all experts started from (updates are measured from them). None is allowed for methods
            that need no base, such as `average`.
        experts: `{name: pytree}`, or a sequence (named `expert_0`, ...), or `Stacked(params, names)` with a leading
            expert axis. Their order counts where a formula is not symmetric (`slerp`); a dict that is an argument of a
            jitted function arrives there sorted by name. Leaves are floating-point arrays; a `kernel` is
            `[..., d_in, d_out]`, a `weight` is `[..., d_out, d_in]`, a sibling `bias` belongs to it.
        method: a registered name; `describe()` lists them.
        calibration: statistics of calibration data, for methods and options that use them.
        platform: where to merge; None: where the arrays are. `cpu` on a TPU host uses LAPACK, the safe default for one
            projector. Inside a trace the program's own platform decides, and each routine is chosen for it when the
            program is lowered; the argument then changes nothing.
        diagnose: what the report says of the experts whatever the method: `nothing`; `brief`, norms and cosines of the
            updates; `full`, see `diagnostics.full`.
        **options: the method's own; unknown ones are refused. `lambda` may stand for `scale` (`**{"lambda": .5}`). A
            list makes a value differ a tensor, see `settings`.

    Returns:
        Merge(params, report). Each leaf has the dtype of the base's (without a base: of the first expert's); leaves
        that came as NumPy arrays go back as NumPy arrays. All sums are float32 with highest precision, or float64 where
        the input is float64. The report holds the method, its resolved options, diagnostics (of each layer in
        `layers`, of the merge as a whole in `facts`), and `exceptions`: leaves to which the formula does not apply, and
        what was done with them.

    Raises:
        InputError: bad input: one line that names the expert and the leaf, or the option and the nearest known one.
    """
    chosen = registry.find(method)
    experts = experts if isinstance(experts, Stacked) else _named(experts)
    with _precision([base, experts.params if isinstance(experts, Stacked) else experts]):
        seen = _placed(updates.read(base, experts), platform)
        options = registry.resolve(chosen, options, seen.names)
        merged = _apply(chosen, seen, calibration, options)
        params = _finish(seen, merged.leaves, base if base is not None else _first(experts))
        layers = {label: dict(facts) for label, facts in _DIAGNOSES[diagnose](seen, merged.leaves).items()}
    for label, facts in merged.layers.items():
        layers[label] = layers.get(label, {}) | dict(facts)
    report = {
        "method": method,
        "options": {**options, **merged.options},
        "experts": list(seen.names),
        "layers": layers,
        "facts": dict(merged.facts),
        "exceptions": dict(merged.exceptions),
    }
    return Merge(params, report if updates.is_traced(report) else diagnostics.plain(report))


_DIAGNOSES = {"nothing": lambda seen, merged: {}, "brief": diagnostics.brief, "full": diagnostics.full}


def _apply(chosen: Method, seen: Updates, calibration: Calibration | None, options: Mapping[str, Any]) -> Merged:
    """Calls the method: once, or once for each group of tensors with options of their own."""
    if "base" in chosen.needs and not seen.has_base:
        raise InputError(f"merge method {chosen.name!r} measures updates from a base: give what the experts started "
                         "from")
    if "calibration" in chosen.needs and calibration is None:
        raise InputError(f"merge method {chosen.name!r} needs calibration data; give it, or choose a method that needs "
                         "none")
    extra = {"calibration": calibration} if chosen.takes_calibration else {}
    varying = [option for option, value in options.items() if settings.differs(value)]
    if not varying:
        return chosen.function(seen, **extra, **options)
    groups = settings.by_tensor(seen.layout, options, together=chosen.scope != "tensor")
    if calibration is not None or any(chosen.scope_at(plain) == "model" for _, plain in groups):
        raise InputError(f"merge method {chosen.name!r} merges all tensors together, so {varying[0]} cannot differ "
                         "from tensor to tensor; give one value")
    leaves: dict[int, Any] = {}
    layers: dict[str, dict] = {}
    exceptions: dict[str, str] = {}
    for indices, plain in groups:
        part = seen.subset(indices)
        merged = chosen.function(part, **extra, **registry.resolve(chosen, plain, seen.names))
        leaves |= dict(zip(sorted(indices, key=lambda i: seen.layout.paths[i]), merged.leaves))
        layers |= merged.layers
        exceptions |= merged.exceptions
    return Merged([leaves[i] for i in range(len(seen.layout.paths))], layers, {}, exceptions)


def _named(experts: Mapping[str, PyTree] | Sequence[PyTree]) -> dict[str, PyTree]:
    if isinstance(experts, Mapping):
        return {str(name): tree for name, tree in experts.items()}
    if isinstance(experts, Sequence):
        return {f"expert_{i}": tree for i, tree in enumerate(experts)}
    raise InputError(f"experts are a {type(experts).__name__}; give a mapping from names to pytrees, or a sequence")


def _first(experts: Mapping[str, PyTree] | Stacked) -> PyTree:
    return experts.params if isinstance(experts, Stacked) else next(iter(experts.values()))


def _precision(trees: Sequence[PyTree]) -> contextlib.AbstractContextManager:
    """Float64 arithmetic where some leaf is float64; JAX would otherwise round it to float32."""
    wide = any(getattr(leaf, "dtype", None) == np.float64 for leaf in jax.tree.leaves(list(trees)))
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _placed(seen: Updates, platform: str | None) -> Updates:
    """The experts on the platform asked for; traced ones stay where their program runs."""
    if platform is None or updates.is_traced(seen):
        return seen
    try:
        return jax.device_put(seen, jax.devices(platform)[0])
    except RuntimeError as error:
        raise InputError(f"platform {platform!r} is not here ({', '.join(_platforms())} is): leave it out") from error


def _platforms() -> list[str]:
    return sorted({device.platform for device in jax.devices()})


def _finish(seen: Updates, merged: list[jax.Array], target: PyTree) -> PyTree:
    """Base + merged update, each leaf in the dtype and kind (NumPy or JAX) of the target's."""
    targets = jax.tree.leaves(target)
    leaves, fine = _summed(seen, merged, tuple(np.dtype(like.dtype) for like in targets))
    if not updates.is_traced(leaves):
        for path, leaf, ok in zip(seen.layout.paths, leaves, jax.device_get(fine)):
            if not ok:
                raise InputError(f"the merged leaf {path!r} overflows {leaf.dtype}; use a smaller scale or a wider "
                                 "dtype")
        leaves = [np.asarray(leaf) if isinstance(like, np.ndarray) else leaf for leaf, like in zip(leaves, targets)]
    return jax.tree_util.tree_unflatten(seen.layout.treedef, leaves)


@partial(jax.jit, static_argnums=2)
def _summed(seen: Updates, merged: list[jax.Array], dtypes: tuple[Any, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
    bases = [0] * len(merged) if seen.base is None else seen.base_leaves
    leaves = [(base + update).astype(dtype) for base, update, dtype in zip(bases, merged, dtypes)]
    return leaves, [updates.finite(leaf) for leaf in leaves]
