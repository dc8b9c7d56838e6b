"""Which tensor of a checkpoint is which parameter of a model. The contract: every name on both sides is accounted for.

A model family has one table, `Names`, that is read in both directions. `Rule("layers/{layer}/up/kernel",
("model.layers.{layer}.mlp.up_proj.weight",), transposed)` says that layer 3's `up/kernel` is that tensor, transposed.
On disk layers are apart (`layers/3/up/kernel`); a network that scans its layers holds them stacked, as one leaf
`layers/up/kernel` whose leading axis is `{layer}`, and one that does not as leaves `layers/0/up/kernel`, ...: a table
serves all three. Whatever a table does not explain is an error, never skipped.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError

_SHOWN = 4  # names of each kind that an error message spells out
_THREADS = 4  # read one leaf's entries
_ROWS = 16  # of a matrix that are transposed at once: a cache line of the result, or two


class Transform(NamedTuple):
    """Between a checkpoint's tensor (or tensors) and one parameter of ours."""

    forward: Callable[..., np.ndarray]  # from the tensors named by a rule's keys
    inverse: Callable[[np.ndarray], np.ndarray] | None  # None: what was read cannot be written back


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _turned(matrix: np.ndarray) -> np.ndarray:
    """The transpose, in memory of its own; some rows at a time, which is several times as fast as all at once."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    source, target = (m.view(f"u{m.itemsize}") for m in (np.ascontiguousarray(matrix), out))
    for start in range(0, len(source), _ROWS):
        target[:, start : start + _ROWS] = source[start : start + _ROWS].T
    return out


identity = Transform(_same, _same)
transposed = Transform(_turned, _turned)  # torch's `[d_out, d_in]` and Flax's `[d_in, d_out]`


@dataclass(frozen=True)
class Rule:
    """Where one parameter of a model (or one of each layer) comes from, and goes to.

    Fields:
        path: ours, slash-separated, with a placeholder for the layer's number: `layers/{layer}/q/kernel`.
        keys: the checkpoint's tensor names with the same placeholder, as they are written. Several feed one parameter
            where weights are folded.
        transform: between the two.
    """

    path: str
    keys: tuple[str, ...]
    transform: Transform = identity


@dataclass(frozen=True)
class Names:
    """The table of a model family.

    Fields:
        rules: one a parameter.
        aliases: `(regex, replacement)`, applied in order with `re.sub` to names that are read, so that other layouts
            become the one that the rules name. Each regex begins with `^`.
        ignore: regexes of whole names (after the aliases) that checkpoints may hold and nobody needs: buffers.
    """

    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    def within(self, path: str, key: str) -> "Names":
        """The same table inside a larger model: our paths below `path/`, the checkpoint's names after `key`."""
        rules = (
            replace(rule, path=f"{path}/{rule.path}", keys=tuple(key + one for one in rule.keys)) for rule in self.rules
        )
        aliases = ((_after(key, pattern), replacement) for pattern, replacement in self.aliases)
        return Names(tuple(rules), tuple(aliases), tuple(f"{re.escape(key)}(?:{one})" for one in self.ignore))

    def ours(self) -> "Names":
        """The table of a checkpoint that names its tensors as we do: every key is the path."""
        return Names(tuple(Rule(rule.path, (rule.path,)) for rule in self.rules))

    def canonical(self, name: str) -> str:
        """A name that was read, in the layout that the rules name."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name


def _after(key: str, pattern: str) -> str:
    """A pattern for the beginning of names, as one for what follows `key` at their beginning."""
    key = re.escape(key)
    if pattern.startswith("(?<=^"):
        return pattern.replace("(?<=^", f"(?<=^{key}", 1)
    if not pattern.startswith("^"):
        raise ValueError(f"the alias {pattern!r} must begin with ^")
    return f"(?<=^{key})(?:{pattern[1:]})"


class Entry(NamedTuple):
    """One parameter as it is on disk."""

    path: str  # ours, with the layer's number
    keys: tuple[str, ...]  # the checkpoint's
    transform: Transform
    shape: tuple[int, ...]  # ours


    @property
    def given(self) -> tuple[int, ...]:
        """The shape that the checkpoint's one tensor has; ValueError if there are several."""
        if self.transform.inverse is None or len(self.keys) != 1:
            raise ValueError(f"{self.path} cannot be written back")
        if self.transform is identity:
            return self.shape
        if self.transform is transposed:
            return self.shape[::-1]
        return self.transform.inverse(np.broadcast_to(np.int8(0), self.shape)).shape


class Leaf(NamedTuple):
    """One leaf of a network's tree: one entry, or one for each index of its leading axis."""

    path: str
    target: jax.ShapeDtypeStruct
    entries: tuple[Entry, ...]
    stacked: bool


def leaves(names: Names, abstract: Any) -> list[Leaf]:
    """The leaves of a tree (nested dicts of `jax.ShapeDtypeStruct`) with what a table says about each, in their order.

    ValueError if the table has no rule for one: a bug in the table.
    """
    flat, _ = jax.tree.flatten_with_path(abstract)
    matchers = [_Matcher(rule) for rule in names.rules]
    return [_leaf(path_name(path), target, matchers) for path, target in flat]


def path_name(path: tuple) -> str:
    """`layers/q/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


class _Matcher:
    """The leaf paths that a rule speaks of: the layers apart, or stacked."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.apart = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.path)))
        self.axes = re.findall(r"{(\w+)}", rule.path)
        self.stacked = re.sub(r"/{\w+}", "", rule.path) if len(self.axes) == 1 else None


def _leaf(path: str, target: jax.ShapeDtypeStruct, matchers: Iterable[_Matcher]) -> Leaf:
    for matcher in matchers:
        if path == matcher.stacked:
            (axis,) = matcher.axes
            entries = (_entry(matcher.rule, {axis: i}, target.shape[1:]) for i in range(target.shape[0]))
            return Leaf(path, target, tuple(entries), True)
        if match := matcher.apart.fullmatch(path):
            return Leaf(path, target, (_entry(matcher.rule, match.groupdict(), target.shape),), False)
    raise ValueError(f"the name table has no rule for the parameter {path}")


def _entry(rule: Rule, numbers: Mapping[str, Any], shape: tuple[int, ...]) -> Entry:
    keys = tuple(key.format(**numbers) for key in rule.keys)
    return Entry(rule.path.format(**numbers), keys, rule.transform, tuple(shape))


def resolve(present: Iterable[str], names: Names, entries: Iterable[Entry], where: str) -> dict[str, str]:
    """The name in the checkpoint of every key that `entries` need.

    InputError if one is missing, if a name in the checkpoint is unknown, or if two mean the same key.
    """
    found: dict[str, str] = {}
    for name in present:
        key = names.canonical(name)
        if key in found:
            raise InputError(f"{where}: {found[key]} and {name} are the same tensor ({key}); get the model again")
        found[key] = name
    needed = {key for entry in entries for key in entry.keys}
    missing = sorted(needed - found.keys())
    extra = [key for key in found.keys() - needed if not any(re.fullmatch(one, key) for one in names.ignore)]
    unknown = sorted(found[key] for key in extra)
    if missing or unknown:
        parts = [f"{len(missing)} missing: {_listing(missing, unknown)}"] if missing else []
        parts += [f"{len(unknown)} unknown: {_listing(unknown, missing)}"] if unknown else []
        said = "; ".join(parts)
        raise InputError(f"{where}: tensor names do not match the model; {said}; is it another architecture?")
    return {key: found[key] for key in needed}


def _listing(names: list[str], others: list[str]) -> str:
    """The first names, each with the nearest unmatched name of the other side."""

    def one(name):
        near = difflib.get_close_matches(name, others, n=1)
        return f"{name} (nearest: {near[0]})" if near else name

    rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(one, names[:_SHOWN])) + rest


def load(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    abstract: Any,
    *,
    where: str = "checkpoint",
    shardings: Any = None,
) -> Any:
    """Fills the tree `abstract` (nested dicts of `jax.ShapeDtypeStruct`) from `tensors`; returns it with JAX arrays.

    Leaves are read in their order, the entries of one by a few threads (so `tensors` must allow that), and each goes to
    its devices before the next is read: beside the model, one leaf is in memory at most.

    Args:
        tensors: the checkpoint, by name; may be lazy.
        names: the table.
        abstract: shapes and dtypes of the result.
        where: names the checkpoint in errors.
        shardings: a tree like `abstract`; None: the default device.

    Raises:
        InputError: a tensor is missing, unknown, there twice, of the wrong shape, or not finite.
    """
    plan = leaves(names, abstract)
    real = resolve(tensors.keys(), names, (entry for leaf in plan for entry in leaf.entries), where)
    places = [None] * len(plan) if shardings is None else jax.tree.leaves(shardings)

    def value(entry: Entry, dtype: Any) -> np.ndarray:
        return converted(entry, [tensors[real[key]] for key in entry.keys], dtype, where)

    with ThreadPoolExecutor(_THREADS, "read") as pool:
        loaded = [_placed(_filled(leaf, value, pool), place) for leaf, place in zip(plan, places, strict=True)]
    return jax.tree.structure(abstract).unflatten(loaded)


def converted(entry: Entry, tensors: Sequence[np.ndarray], dtype: Any, where: str) -> np.ndarray:
    """Our parameter from the checkpoint's tensors, checked; `dtype` None: as they are."""
    empty = next((key for key, tensor in zip(entry.keys, tensors) if not tensor.size), None)
    if empty and 0 not in entry.shape:
        raise is_empty(empty, where)
    found = entry.transform.forward(*tensors)
    if found.shape != entry.shape:
        raise InputError(f"{where}: {entry.keys[0]} gives {entry.path} shape {list(found.shape)}; the model's config "
                         f"needs {list(entry.shape)}")
    cast = found if dtype is None else as_dtype(found, dtype)
    if not finite(cast):
        raise not_finite(entry.keys[0], where, dtype if finite(found) else None)
    return cast


def as_dtype(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A cast in which what is too large becomes infinite, silently."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def not_finite(name: str, where: str, cast: Any = None) -> InputError:
    """The error for a tensor with NaN or infinity, in itself or after a cast."""
    if cast is not None:
        return InputError(f"{where}: {name} holds values that are too large for {np.dtype(cast)}; choose another dtype")
    return InputError(f"{where}: {name} holds values that are not finite; get the file again")


def is_empty(name: str, where: str) -> InputError:
    """The error for a tensor without values."""
    return InputError(f"{where}: {name} is empty, as DeepSpeed's ZeRO-3 leaves parameters that were not gathered; save "
                      "with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on its checkpoint")


def finite(array: np.ndarray) -> bool:
    """Whether a floating-point array (float8 included) holds neither NaN nor infinity; True for other dtypes."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
        return True
    # Bit patterns grow with the magnitude, up to infinity and NaN; those of negative numbers as unsigned integers.
    kind, size = jnp.finfo(array.dtype), array.itemsize
    largest = int(np.array(kind.max, array.dtype).view(f"u{size}"))
    bits = array.view(f"u{size}")
    return bool(bits.view(f"i{size}").max() <= largest and bits.max() <= largest + (1 << 8 * size - 1))


def _filled(leaf: Leaf, value: Callable[[Entry, Any], np.ndarray], pool: ThreadPoolExecutor) -> np.ndarray:
    if not leaf.stacked:
        return value(leaf.entries[0], leaf.target.dtype)
    stack = np.empty(leaf.target.shape, leaf.target.dtype)

    def fill(i: int) -> None:
        stack[i] = value(leaf.entries[i], leaf.target.dtype)

    list(pool.map(fill, range(len(leaf.entries))))
    return stack


def _placed(leaf: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
