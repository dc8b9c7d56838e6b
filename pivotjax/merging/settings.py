"""Options that differ a tensor, in mergekit's vocabulary and with its meaning.

A *setting* is a plain value; a list of values, the *layer gradient*: numbers are interpolated linearly over the depth
of the model, words and truth values change from one to the next; or a list of `{filter: TEXT, value: SETTING}`: the
first whose text is part of the tensor's name (or that has no filter, or `*`) decides.
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
    if setting and not any(isinstance(v, (Mapping, list, type(None))) for v in setting):
        return None
    if setting and all(isinstance(v, Mapping) and "value" in v and set(v) <= {"filter", "value"} for v in setting):
        return next(filter(None, (problem(v["value"]) for v in setting if isinstance(v["value"], list))), None)
    return f"{setting!r} must be a list of values (over the layers) or of `filter: TEXT, value: ...` entries"


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
    low = int(position)
    share = position - low
    if share == 0 or not all(map(_is_number, setting)):
        return setting[low]
    return (1 - share) * setting[low] + share * setting[low + 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(options: Mapping[str, Any], path: str, depth: float) -> dict[str, Any]:
    """A method's options for one tensor: every setting, and every setting for an expert, evaluated."""

    def at(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: evaluate(setting, path, depth) for name, setting in value.items()}
        return evaluate(value, path, depth)

    return {option: at(value) for option, value in options.items()}


def by_tensor(
    layout: Layout, options: Mapping[str, Any], together: bool = True
) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Groups of leaves with equal plain options: `[(leaf indices, options), ...]`.

    Args:
        layout: of the parameters.
        options: settings.
        together: a layer's bias takes the options of its weight, for methods that merge the two as one matrix.
    """
    depths = relative_depths(layout.paths)
    owner = {layer.bias: layer.weight for layer in layout.layers if together and layer.bias is not None}
    groups: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for index in range(len(layout.paths)):
        path = layout.paths[owner.get(index, index)]
        chosen = plain(options, path, depths[path])
        groups.setdefault(repr(chosen), ([], chosen))[0].append(index)
    return [(tuple(indices), chosen) for indices, chosen in groups.values()]


def relative_depths(paths: Sequence[str]) -> dict[str, float]:
    """How deep in the model each tensor lies, from the block number in its name: 0 (first) to 1 (last).

    Blocks of one kind (names that differ in the number alone, `layers.3.` or `linear_3/`) share a scale; a single block
    lies at 1. Tensors outside all blocks (embeddings, the last norm, `lm_head`) lie at 0. Both are mergekit's rules.
    """
    blocks = {path: block(path) for path in paths}
    numbers: dict[str, list[int]] = {}
    for stem, number in filter(None, blocks.values()):
        numbers.setdefault(stem, []).append(number)
    spans = {stem: (min(found), max(found)) for stem, found in numbers.items()}
    depths = {}
    for path, found in blocks.items():
        if found is None:
            depths[path] = 0.0
            continue
        stem, number = found
        low, high = spans[stem]
        depths[path] = (number - low) / (high - low) if high > low else 1.0
    return depths


def in_block(path: str) -> bool:
    """Whether a tensor belongs to a numbered block."""
    return block(path) is not None


def block_count(paths: Sequence[str]) -> int:
    """How many blocks the model has: of the kind that has most of them."""
    numbers: dict[str, set[int]] = {}
    for stem, number in filter(None, map(block, paths)):
        numbers.setdefault(stem, set()).add(number)
    return max(map(len, numbers.values()), default=0)


def block(path: str) -> tuple[str, int] | None:
    """`model.layers.3.mlp.up` -> (`model.layers.`, 3): the first number that stands alone or after an underscore."""
    found = re.search(r"(?:^|[./_])(\d+)(?=[./]|$)", path)
    return (path[: found.start(1)], int(found[1])) if found else None
