"""From a checkpoint's tensor names to a model's parameters. The contract: every name on both sides is accounted for.

A table of `Rule`s is written from the model's side. `Rule("layers/up/kernel", ("blk.{layer}.ffn_up.weight",),
transposed)` says that the leaf `layers/up/kernel`, stacked on its leading axis, takes entry `layer` from that tensor. A
placeholder that also stands in the path (`blocks/{block}/bias`) is a plain substitution instead. Several keys feed one
leaf where weights are folded. Whatever a table does not explain is an error, never skipped.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError

_SHOWN = 4  # names of each kind that an error message spells out


def identity(array: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """torch's `[d_out, d_in]` as Flax's `[d_in, d_out]`."""
    return array.T


@dataclass(frozen=True)
class Rule:
    """Where one leaf (or one family of leaves) of a model comes from."""

    path: str  # slash-separated, may hold {placeholders}
    keys: tuple[str, ...]  # the checkpoint's tensor names; a placeholder absent from `path` runs over the leading axis
    transform: Callable[..., np.ndarray] = identity  # from the tensors named by `keys` to one entry of the leaf


@dataclass(frozen=True)
class _Leaf:
    path: str
    sources: tuple[tuple[str, ...], ...]  # one tuple of keys an entry of the leading axis; a single one if not stacked
    stacked: bool
    transform: Callable[..., np.ndarray]


def load(
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignore: Iterable[str] = (),
    where: str = "checkpoint",
) -> Any:
    """Fills the tree `abstract` (nested dicts of `jax.ShapeDtypeStruct`) from `tensors`; returns it with JAX arrays.

    `tensors` is read one tensor at a time, in the order of the leaves, so a lazy mapping never holds the model twice.
    `ignore` are regular expressions of names that the model family knows and does not need.
    InputError if a tensor is missing, unknown, of the wrong shape, or not finite.
    """
    flat, treedef = jax.tree.flatten_with_path(abstract)
    shapes = {path_name(path): leaf for path, leaf in flat}
    leaves = [_leaf(path, shape.shape, rules) for path, shape in shapes.items()]
    _check_coverage(tensors.keys(), leaves, list(ignore), where)
    return treedef.unflatten([_read(leaf, shapes[leaf.path], tensors, where) for leaf in leaves])


def path_name(path: tuple) -> str:
    """`layers/q/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def _leaf(path: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> _Leaf:
    for rule in rules:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.path))
        if match := re.fullmatch(pattern, path):
            fixed = match.groupdict()
            free = {name for key in rule.keys for name in re.findall(r"{(\w+)}", key)} - set(fixed)
            entries = [dict.fromkeys(free, i) for i in range(shape[0])] if free else [{}]
            sources = tuple(tuple(key.format(**fixed, **entry) for key in rule.keys) for entry in entries)
            return _Leaf(path, sources, bool(free), rule.transform)
    raise ValueError(f"the name table has no rule for the parameter {path}")


def _check_coverage(present: Iterable[str], leaves: list[_Leaf], ignore: list[str], where: str) -> None:
    present = set(present)
    needed = {key for leaf in leaves for keys in leaf.sources for key in keys}
    missing = sorted(needed - present)
    unknown = sorted(k for k in present - needed if not any(re.fullmatch(pattern, k) for pattern in ignore))
    if not missing and not unknown:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_listing(missing, unknown)}")
    if unknown:
        parts.append(f"{len(unknown)} unknown: {_listing(unknown, missing)}")
    raise InputError(f"{where}: tensor names do not match the model; {'; '.join(parts)}; is it another architecture?")


def _listing(names: list[str], others: list[str]) -> str:
    """The first names, each with the nearest unmatched name of the other side."""

    def one(name):
        near = difflib.get_close_matches(name, others, n=1)
        return f"{name} (nearest: {near[0]})" if near else name

    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(one, names[:_SHOWN])) + rest


def _read(leaf: _Leaf, target: jax.ShapeDtypeStruct, tensors: Mapping[str, np.ndarray], where: str) -> jax.Array:
    """One leaf; beside it at most one of its entries, or its own copy on the way to the device, is in memory."""
    shape = target.shape[1:] if leaf.stacked else target.shape

    def entry(keys):
        value = leaf.transform(*(tensors[key] for key in keys)).astype(target.dtype, copy=False)
        if value.shape != shape:
            found, wanted = list(value.shape), list(shape)
            raise InputError(f"{where}: {keys[0]} gives {leaf.path} shape {found}; the model's config needs {wanted}")
        if not np.isfinite(value).all():
            raise InputError(f"{where}: {keys[0]} holds values that are not finite; get the file again")
        return value

    if not leaf.stacked:
        return jnp.asarray(entry(leaf.sources[0]))
    stack = np.empty(target.shape, target.dtype)
    for i, keys in enumerate(leaf.sources):
        stack[i] = entry(keys)
    return jnp.asarray(stack)
