"""Options that differ a tensor, in mergekit's vocabulary.

A *setting* is a plain value; a list of numbers, the *layer gradient*: interpolated linearly over the depth of the
model; or a list of `{filter: TEXT, value: SETTING}`: the first whose text is part of the tensor's name (or that has no
filter, or `*`) decides.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pivotjax.errors import InputError
from pivotjax.merging.updates import Layout


def differs(value: Any) -> bool:
    """Whether a setting (or a setting for each expert) may give different tensors different values."""
    return isinstance(value, list) or (isinstance(value, Mapping) and any(map(differs, value.values())))


def problem(setting: list) -> str | None:
    """What is wrong with a list as a setting; None if nothing."""
    if setting and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in setting):
        return None
    if setting and all(isinstance(v, Mapping) and "value" in v and set(v) <= {"filter", "value"} for v in setting):
        return next(filter(None, (problem(v["value"]) for v in setting if isinstance(v["value"], list))), None)
    return f"{setting!r} must be a list of numbers (over the layers) or of `filter: TEXT, value: ...` entries"


def values(setting: Any) -> list[Any]:
    """The plain values that a setting is made of (interpolated ones lie between them)."""
    if isinstance(setting, list):
        return [v for entry in setting for v in values(entry["value"] if isinstance(entry, Mapping) else entry)]
    return [setting]


def evaluate(setting: Any, path: str, depth: float) -> Any:
    """The plain value of a setting for one tensor.

    Args:
        setting: see the module.
        path: the tensor's name.
        depth: where the tensor lies, 0 (first layer) to 1 (last).

    Raises:
        InputError: no filter of the list fits.
    """
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            if entry.get("filter") in (None, "*") or entry["filter"] in path:
                return evaluate(entry["value"], path, depth)
        raise InputError(f"no `filter` fits tensor {path!r}: add a last entry with a value alone, for all others")
    position = depth * (len(setting) - 1)
    low = min(int(position), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (position - low) * (setting[high] - setting[low])


def by_tensor(layout: Layout, options: Mapping[str, Any]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Groups of leaves with equal plain options: `[(leaf indices, options), ...]`.

    A layer's bias takes the options of its weight, so that the two stay together.
    """
    depths = relative_depths(layout.paths)
    owner = {layer.bias: layer.weight for layer in layout.layers if layer.bias is not None}
    groups: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for index in range(len(layout.paths)):
        path = layout.paths[owner.get(index, index)]
        plain = {option: _plain(value, path, depths[path]) for option, value in options.items()}
        groups.setdefault(repr(plain), ([], plain))[0].append(index)
    return [(tuple(indices), plain) for indices, plain in groups.values()]


def _plain(value: Any, path: str, depth: float) -> Any:
    if isinstance(value, Mapping):
        return {name: evaluate(setting, path, depth) for name, setting in value.items()}
    return evaluate(value, path, depth)


def relative_depths(paths: Sequence[str]) -> dict[str, float]:
    """How deep in the model each tensor lies, from the block number in its name: 0 (first) to 1 (last).

    Blocks of one kind (names that differ in the number alone, `layers.3.` or `linear_3/`) share a scale. Tensors
    without a number lie at 0, or at 1 where they come after the blocks (`lm_head`, `norm`).
    """
    blocks = {path: _block(path) for path in paths}
    numbers: dict[str, list[int]] = {}
    for stem, number in filter(None, blocks.values()):
        numbers.setdefault(stem, []).append(number)
    depths = {}
    for path, block in blocks.items():
        if block is None:
            depths[path] = float(any(word in path for word in _LAST))
            continue
        low, high = min(numbers[block[0]]), max(numbers[block[0]])
        depths[path] = (block[1] - low) / max(high - low, 1)
    return depths


_LAST = ("lm_head", "norm", "head")


def _block(path: str) -> tuple[str, int] | None:
    """`model.layers.3.mlp.up` -> (`model.layers.`, 3): the first number that stands alone or after an underscore."""
    found = re.search(r"(?:^|[./_])(\d+)(?=[./]|$)", path)
    return (path[: found.start(1)], int(found[1])) if found else None
