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
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging import spectral

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

    @property
    def weights(self) -> tuple[int, ...]:
        """Indices of the layers' weights (kernels)."""
        return tuple(layer.weight for layer in self.layers)

    @property
    def groups(self) -> list[list[Layer]]:
        """The layers, those whose matrices have one shape together."""
        groups: dict[tuple[int, int], list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.matrix_shape, []).append(layer)
        return list(groups.values())

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


@partial(jax.tree_util.register_dataclass, data_fields=("base", "experts"), meta_fields=("names", "layout"))
@dataclass(frozen=True)
class Updates:
    """What a merge method sees: K experts and the base that their updates are measured from.

    A pytree: hand it to a jitted kernel and read its properties *there*, so that XLA fuses subtraction, stacking and
    the method's own arithmetic and no copy of the experts is made. All properties are float32 (float64 where the
    input is).

    `base` has the layout's leaves (None: updates are the weights themselves); `experts` has, a leaf, K arrays or one
    array `[K, ...]` that was stacked already. Both keep the dtypes they came in.
    """

    names: tuple[str, ...]
    layout: Layout
    base: tuple[Array, ...] | None
    experts: tuple[tuple[Array, ...] | Array, ...]

    @property
    def has_base(self) -> bool:
        """Whether updates are measured from a base."""
        return self.base is not None

    @cached_property  # looks at every leaf, and is asked for each
    def dtype(self) -> Any:
        """In which sums are made: float64 where some leaf is, else float32."""
        wide = any(np.dtype(leaf.dtype) == np.float64 for leaf in jax.tree.leaves((self.base, self.experts)))
        return jnp.float64 if wide else jnp.float32

    @property
    def weights(self) -> list[Array]:
        """The experts' parameters: one `[K, ...]` a leaf."""
        return [_stack(leaf, self.dtype) for leaf in self.experts]

    @property
    def base_leaves(self) -> list[Array]:
        """The base's parameters, zeros without one."""
        if self.base is None:
            return [jnp.zeros(shape, self.dtype) for shape in self.layout.shapes]
        return [leaf.astype(self.dtype) for leaf in self.base]

    @property
    def stacked(self) -> list[Array]:
        """The updates `D_k = W_k - W0`: one `[K, ...]` a leaf."""
        return self.weights if self.base is None else [w - b for w, b in zip(self.weights, self.base_leaves)]

    @property
    def layers(self) -> dict[str, Array]:
        """Updates of the layers, the bias joined: `{layer: [K, n, d_out, d_in (+1)]}`."""
        return _matrices(self.layout, self.stacked)

    @property
    def kernels(self) -> dict[str, Array]:
        """Updates of the layers' weights alone: `{layer: [K, n, d_out, d_in]}`."""
        return _matrices(self.layout, self.stacked, with_bias=False)

    @property
    def base_layers(self) -> dict[str, Array]:
        """`{layer: [n, d_out, d_in (+1)]}` of the base."""
        return {name: m[0] for name, m in _matrices(self.layout, [leaf[None] for leaf in self.base_leaves]).items()}

    def tree(self, leaves: Sequence[Array]) -> PyTree:
        """A pytree of the experts' structure with other leaves."""
        return jax.tree_util.tree_unflatten(self.layout.treedef, list(leaves))

    def all_parameters(self) -> PyTree:
        """The experts' parameters as one pytree, leaves `[K, ...]`."""
        return self.tree(_weights(self))

    def parameters(self, update: Sequence[Array]) -> PyTree:
        """Base + update as a pytree of parameters."""
        return self.tree(_add(self, list(update)))

    def others_mean(self) -> dict[int, Array]:
        """Mean updates of the leaves that belong to no layer: what methods on matrices do with them."""
        return {i: spectral.mean(leaf) for i, leaf in enumerate(self.stacked) if i in self.layout.others}

    def vectors_mean(self) -> dict[int, Array]:
        """Mean updates of the leaves that are no layer's weight (biases too): for methods that work on `kernels`."""
        return {i: spectral.mean(leaf) for i, leaf in enumerate(self.stacked) if i not in self.layout.weights}

    def subset(self, leaves: Sequence[int]) -> "Updates":
        """The same experts with some of their leaves only, as a flat dict by path."""
        leaves = sorted(leaves, key=lambda i: self.layout.paths[i])
        flat = {self.layout.paths[i]: jax.ShapeDtypeStruct(self.layout.shapes[i], self.layout.dtypes[i])
                for i in leaves}
        base = None if self.base is None else tuple(self.base[i] for i in leaves)
        return Updates(self.names, layout_of(flat), base, tuple(self.experts[i] for i in leaves))


def _stack(leaf: tuple[Array, ...] | Array, dtype: Any) -> Array:
    return jnp.stack([one.astype(dtype) for one in leaf]) if isinstance(leaf, tuple) else leaf.astype(dtype)


@jax.jit
def _weights(updates: Updates) -> list[Array]:
    return updates.weights


@jax.jit
def _add(updates: Updates, update: list[Array]) -> list[Array]:
    return [b + u for b, u in zip(updates.base_leaves, update)]


def _matrices(layout: Layout, stacked: Sequence[Array], with_bias: bool = True) -> dict[str, Array]:
    return {layer.name: _matrix(layer, stacked, with_bias) for layer in layout.layers}


def _matrix(layer: Layer, stacked: Sequence[Array], with_bias: bool) -> Array:
    weight = stacked[layer.weight]
    weight = weight.swapaxes(-1, -2) if layer.transposed else weight
    if with_bias and layer.bias is not None:
        weight = jnp.concatenate([weight, stacked[layer.bias][..., None]], axis=-1)
    return weight.reshape(weight.shape[0], layer.count, *weight.shape[-2:])


def leaves_from(layout: Layout, matrices: Mapping[str, Array], others: Mapping[int, Array]) -> list[Array]:
    """The inverse of `Updates.layers` (or of `Updates.kernels`) for one merged update; for use under `jax.jit`.

    Args:
        layout: of the pytree.
        matrices: `{layer: [n, d_out, d_in (+1)]}` for every layer.
        others: `{leaf index: array}` for the leaves that the matrices do not hold.

    Returns:
        One array a leaf, in the layout's order and shapes.
    """
    leaves = dict(others)
    for layer in layout.layers:
        matrix = matrices[layer.name]
        matrix = matrix.reshape(*layer.lead, *matrix.shape[-2:])
        weight = matrix[..., : layer.d_in]
        leaves[layer.weight] = weight.swapaxes(-1, -2) if layer.transposed else weight
        if layer.bias is not None and matrix.shape[-1] > layer.d_in:
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


@dataclass(frozen=True)
class Stacked:
    """Experts in one pytree whose leaves carry a leading `expert` axis, as a training program holds them."""

    params: PyTree
    names: Sequence[str] | None = None


def read(base: PyTree | None, experts: Mapping[str, PyTree] | Stacked) -> Updates:
    """Checks the parameters and makes them what methods see. Under a trace values cannot be looked at: shapes only.

    Args:
        base: the pytree that updates are measured from; None: the updates are the weights themselves.
        experts: `{name: pytree}` of floating-point arrays, all with the base's structure and shapes; or `Stacked`.

    Raises:
        InputError: no expert; a structure or shape that differs; a leaf that is not finite or not floating point.
    """
    if isinstance(experts, Stacked):
        seen = _read_stacked(base, experts)
    elif not experts:
        raise InputError("nothing to merge: give at least one expert")
    else:
        named = ({"the base": base} if base is not None else {}) | {f"expert {n!r}": t for n, t in experts.items()}
        layout = _common_layout(named)
        columns = [tuple(map(_array, jax.tree.leaves(tree))) for tree in experts.values()]
        seen = Updates(tuple(experts), layout, _base(base), tuple(zip(*columns)))
    if not is_traced(seen):
        _check_finite(seen)
    return seen


def _read_stacked(base: PyTree | None, experts: Stacked) -> Updates:
    leaves = jax.tree.leaves(experts.params)
    count = leaves[0].shape[0] if leaves and leaves[0].ndim else 0
    names = tuple(experts.names) if experts.names is not None else tuple(f"expert_{i}" for i in range(count))
    if not count or len(names) != count or any(leaf.ndim == 0 or leaf.shape[0] != count for leaf in leaves):
        raise InputError(f"stacked experts: every leaf needs a leading axis of {len(names)} experts")
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), experts.params)
    named = ({"the base": base} if base is not None else {}) | {"the stack of experts": first}
    return Updates(names, _common_layout(named), _base(base), tuple(map(_array, leaves)))


def _base(base: PyTree | None) -> tuple[Array, ...] | None:
    return None if base is None else tuple(map(_array, jax.tree.leaves(base)))


def _array(leaf: Any) -> Array:
    """The leaf as a JAX array in its own dtype."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def is_traced(tree: PyTree) -> bool:
    """Whether some leaf is known by shape and dtype only, inside `jax.jit` and its kin."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


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


def finite(leaf: Array) -> Array:
    """Whether all entries are finite."""
    return jnp.isfinite(leaf).all()


@jax.jit
def _finite(leaves: list[Array]) -> list[Array]:
    return [finite(leaf) for leaf in leaves]


def _check_finite(updates: Updates) -> None:
    paths = updates.layout.paths
    leaves, labels = list(updates.base or ()), [("the base", path) for path in paths if updates.base is not None]
    for path, leaf in zip(paths, updates.experts):
        for k, name in enumerate(updates.names):
            leaves.append(leaf[k])
            labels.append((f"expert {name!r}", path))
    for (name, path), fine in zip(labels, jax.device_get(_finite(leaves))):
        if not fine:
            raise InputError(f"{name}, leaf {path!r} holds NaN or infinity; leave that expert out or train it again")
