"""Pytrees of parameters <-> stacked updates and their layers.

A *layer* is a leaf named `kernel` (`[..., d_in, d_out]`, Flax) or `weight` (`[..., d_out, d_in]`, torch) with at least
two axes, together with the sibling `bias` (`[..., d_out]`) where there is one. Names are the last component of a
leaf's path, split at `/` and `.`: nested dicts and flat torch state dicts both work. Methods see a layer as matrices
`[K, n, d_out, d_in (+1)]`: K experts, n = the product of the leading axes (1 for a plain layer, the depth of a scanned
stack), the bias joined as one more input column (an input of 1).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError

Array = jax.Array
PyTree = Any


@dataclass(frozen=True)
class Layer:
    """Where a layer's matrix lives among a pytree's leaves."""

    name: str
    weight: int  # index of the leaf `kernel` or `weight`
    bias: int | None
    transposed: bool  # True: `kernel`, [..., d_in, d_out]
    lead: tuple[int, ...]  # leading axes: (depth,) for a scanned stack
    d_out: int
    d_in: int

    @property
    def count(self) -> int:
        """Number of matrices the layer holds."""
        return int(np.prod(self.lead, dtype=int))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of `[W | b]`."""
        return self.d_out, self.d_in + (self.bias is not None)

    def labels(self) -> tuple[str, ...]:
        """One name for each matrix, as reports use them."""
        return (self.name,) if not self.lead else tuple(f"{self.name}[{i}]" for i in range(self.count))


@dataclass(frozen=True)
class Layout:
    """The static part of a pytree: its structure, its leaves' names and shapes, and its layers in forward order.

    Forward order is the natural order of the names (`linear_2` before `linear_10`).
    """

    treedef: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    layers: tuple[Layer, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """Indices of the leaves that belong to no layer (norms, lone biases)."""
        owned = {index for layer in self.layers for index in (layer.weight, layer.bias)}
        return tuple(i for i in range(len(self.paths)) if i not in owned)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)


def layout_of(tree: PyTree) -> Layout:
    """Reads the layout of one pytree of arrays (or of anything with `shape` and `dtype`)."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
    shapes = tuple(tuple(leaf.shape) for _, leaf in flat)
    dtypes = tuple(np.dtype(leaf.dtype) for _, leaf in flat)
    return Layout(treedef, paths, shapes, dtypes, _layers(paths, shapes))


def _layers(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[Layer, ...]:
    index = {path: i for i, path in enumerate(paths)}
    layers = []
    for i, (path, shape) in enumerate(zip(paths, shapes)):
        parent, cut, name = _split(path)
        if name not in ("kernel", "weight") or len(shape) < 2:
            continue
        transposed = name == "kernel"
        lead, (rows, columns) = shape[:-2], shape[-2:]
        d_in, d_out = (rows, columns) if transposed else (columns, rows)
        bias = index.get(f"{parent}{cut}bias")
        if bias is not None and shapes[bias] != (*lead, d_out):
            bias = None
        layers.append(Layer(parent or name, i, bias, transposed, lead, d_out, d_in))
    return tuple(sorted(layers, key=lambda layer: _natural(layer.name)))


def _split(path: str) -> tuple[str, str, str]:
    """`a/b.weight` -> (`a/b`, `.`, `weight`)."""
    cut = max(path.rfind("/"), path.rfind("."))
    return (path[:cut], path[cut], path[cut + 1 :]) if cut >= 0 else ("", "", path)


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Updates:
    """What a merge method sees: K experts' updates from one base, in float32 (float64 where the input is).

    `base` and `stacked` follow the layout's leaves; `stacked[i]` is `[K, ...]`. Without a base (`has_base` False) the
    base is zeros and the updates are the experts' weights.
    """

    names: tuple[str, ...]
    layout: Layout
    base: list[Array]
    stacked: list[Array]
    has_base: bool

    @property
    def layers(self) -> dict[str, Array]:
        """`{layer: [K, n, d_out, d_in (+1)]}`."""
        return _matrices(self.layout, self.stacked)

    @property
    def base_layers(self) -> dict[str, Array]:
        """`{layer: [n, d_out, d_in (+1)]}` of the base."""
        return _base_matrices(self.layout, self.base)

    def experts(self) -> PyTree:
        """The experts' parameters, stacked: leaves `[K, ...]`."""
        return self.tree(self.stacked)

    def tree(self, update: list[Array]) -> PyTree:
        """Base + update as a pytree of parameters."""
        return jax.tree_util.tree_unflatten(self.layout.treedef, _add(self.base, update))

    def others_mean(self) -> dict[int, Array]:
        """Mean updates of the leaves that belong to no layer: what methods on matrices do with them."""
        return {i: self.stacked[i].mean(0) for i in self.layout.others}


@jax.jit
def _add(base: list[Array], update: list[Array]) -> list[Array]:
    return [b + u for b, u in zip(base, update)]


@partial(jax.jit, static_argnums=0)
def _matrices(layout: Layout, stacked: list[Array]) -> dict[str, Array]:
    return {layer.name: _matrix(layer, stacked) for layer in layout.layers}


@partial(jax.jit, static_argnums=0)
def _base_matrices(layout: Layout, base: list[Array]) -> dict[str, Array]:
    return {layer.name: _matrix(layer, [leaf[None] for leaf in base])[0] for layer in layout.layers}


def _matrix(layer: Layer, stacked: Sequence[Array]) -> Array:
    weight = stacked[layer.weight]
    weight = weight.swapaxes(-1, -2) if layer.transposed else weight
    if layer.bias is not None:
        weight = jnp.concatenate([weight, stacked[layer.bias][..., None]], axis=-1)
    return weight.reshape(weight.shape[0], layer.count, *layer.matrix_shape)


@partial(jax.jit, static_argnums=0)
def leaves_from(layout: Layout, matrices: Mapping[str, Array], others: Mapping[int, Array]) -> list[Array]:
    """The inverse of `Updates.layers` for one merged update.

    Args:
        layout: of the pytree.
        matrices: `{layer: [n, d_out, d_in (+1)]}` for every layer.
        others: `{leaf index: array}` for the leaves of no layer.

    Returns:
        One array a leaf, in the layout's order and shapes.
    """
    leaves = dict(others)
    for layer in layout.layers:
        matrix = matrices[layer.name].reshape(*layer.lead, *layer.matrix_shape)
        weight = matrix[..., : layer.d_in]
        leaves[layer.weight] = weight.swapaxes(-1, -2) if layer.transposed else weight
        if layer.bias is not None:
            leaves[layer.bias] = matrix[..., -1]
    return [leaves[i] for i in range(len(layout.paths))]


def batched(function: Callable[..., PyTree], *layers: Mapping[str, Array]) -> dict[str, PyTree]:
    """Calls `function` once for all layers of equal shapes instead of once a layer; for use under `jax.jit`.

    Args:
        function: takes one array `[K, n, ...]` for each mapping, n matrices of one or more layers, and returns a pytree
            of arrays `[n, ...]`.
        *layers: mappings `{layer: [K, n, ...]}` with the same keys.

    Returns:
        `{layer: pytree}` with leaves `[n, ...]`.
    """
    groups: dict[tuple, list[str]] = {}
    for name in layers[0]:
        groups.setdefault(tuple(mapping[name].shape[2:] for mapping in layers), []).append(name)
    results = {}
    for names in groups.values():
        stops = np.cumsum([layers[0][name].shape[1] for name in names])
        result = function(*(jnp.concatenate([mapping[name] for name in names], 1) for mapping in layers))
        for name, start, stop in zip(names, [0, *stops[:-1]], stops):
            results[name] = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], result)
    return results


def read(base: PyTree | None, experts: Mapping[str, PyTree]) -> Updates:
    """Checks the parameters and stacks their updates.

    Args:
        base: the pytree that updates are measured from; None: zeros, the updates are the weights themselves.
        experts: `{name: pytree}` of floating-point arrays, all with the base's structure and shapes.

    Raises:
        InputError: no expert; a structure or shape that differs; a leaf that is not finite or not floating point.
    """
    if not experts:
        raise InputError("nothing to merge: give at least one expert")
    named = ({"the base": base} if base is not None else {}) | {f"expert {name!r}": t for name, t in experts.items()}
    layout = _common_layout(named)
    stacks = [_accumulate(leaves) for leaves in zip(*(jax.tree.leaves(tree) for tree in named.values()))]
    _check_finite(layout, list(named), stacks)
    if base is None:
        return Updates(tuple(experts), layout, [jnp.zeros_like(stack[0]) for stack in stacks], stacks, False)
    base_leaves, stacked = _split_base(stacks)
    return Updates(tuple(experts), layout, base_leaves, stacked, True)


@jax.jit
def _split_base(stacks: list[Array]) -> tuple[list[Array], list[Array]]:
    return [stack[0] for stack in stacks], [stack[1:] - stack[0] for stack in stacks]


def _common_layout(named: Mapping[str, PyTree]) -> Layout:
    layouts = {}
    for name, tree in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not (hasattr(leaf, "shape") and jnp.issubdtype(getattr(leaf, "dtype", None), jnp.floating)):
                what = getattr(leaf, "dtype", type(leaf).__name__)
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(f"{name}, leaf {where!r}: {what} cannot be merged; give floating-point arrays")
        layouts[name] = layout_of(tree)
        if not layouts[name].paths:
            raise InputError(f"{name} holds no arrays; give a pytree of parameters")
    first, reference = next(iter(layouts.items()))
    for name, layout in layouts.items():
        for path in [*reference.paths, *layout.paths]:
            if path not in layout.paths or path not in reference.paths:
                have, lack = (first, name) if path in reference.paths else (name, first)
                raise InputError(f"{have} has leaf {path!r} and {lack} has not; merge parameters of one structure")
        for path, mine, shape in zip(layout.paths, layout.shapes, reference.shapes):
            if mine != shape:
                raise InputError(f"{name}, leaf {path!r}: shape {list(mine)}, but {first} has {list(shape)}; "
                                 "only projectors of equal shapes can be merged")
        if layout.treedef != reference.treedef:
            raise InputError(f"{name} is not built like {first} (same leaves in other containers); convert it first")
    return reference


def _accumulate(leaves: Sequence[Any]) -> Array:
    """Stacks in float32, or in float64 where some leaf is: half precision never accumulates."""
    dtype = jnp.float64 if any(np.dtype(leaf.dtype) == np.float64 for leaf in leaves) else jnp.float32
    return jnp.stack([jnp.asarray(leaf, dtype) for leaf in leaves])


@jax.jit
def _finite(stacks: list[Array]) -> list[Array]:
    return [jnp.isfinite(stack.reshape(stack.shape[0], -1)).all(-1) for stack in stacks]


def _check_finite(layout: Layout, names: Sequence[str], stacks: list[Array]) -> None:
    for path, finite in zip(layout.paths, jax.device_get(_finite(stacks))):
        if not finite.all():
            name = names[int(np.argmin(finite))]
            raise InputError(f"{name}, leaf {path!r} holds NaN or infinity; leave that expert out or train it again")
