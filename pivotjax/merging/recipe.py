"""Merge recipes: YAML in mergekit's vocabulary.

```yaml
models:
  - model: out/experts/emoji.safetensors
    parameters: {weight: 0.5}
  - model: out/experts/icons.safetensors
base_model: out/w0.safetensors
merge_method: pivot
parameters: {basis: energy, lambda: 0.7}
dtype: float32
calibration: {domains: [emoji, icons], items: 128}
```
Only what is written here is understood; an unknown key is refused, never skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pivotjax.errors import InputError
from pivotjax.merging import registry

_KEYS = ("models", "base_model", "merge_method", "parameters", "dtype", "calibration")
_MODEL_KEYS = ("model", "name", "parameters")
_BY_EXPERT = {"weight": "weights", "density": "density"}  # parameters of a model -> the method's option
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_METHODS = {"linear": "average"}  # mergekit's word -> ours
_IGNORED = ("int8_mask",)  # mergekit's way to save memory; it changes no result
# What mergekit means where a recipe of its own leaves an option out.
_MERGEKIT = {"task_arithmetic": {"scale": 1.0}, "ties": {"scale": 1.0, "density": 1.0}}


@dataclass(frozen=True)
class MergeRecipe:
    """A merge, described.

    Fields:
        models: the experts, `(name, path)`; paths as written in the file.
        merge_method: a registered method.
        base_model: path of the parameters that updates are measured from, or None.
        parameters: the method's options that the recipe sets (`merge(..., **parameters)`), checked.
        dtype: `float32`, `bfloat16`, `float16`, `float64`; None: as the checkpoints are.
        calibration: where calibration data come from; read by the job that has the models. None: no calibration.
    """

    models: tuple[tuple[str, str], ...]
    merge_method: str = "pivot"
    base_model: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    calibration: Mapping[str, Any] | None = None


def load(path: Path) -> MergeRecipe:
    """Reads a recipe file; InputError names the file and what is wrong with it."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the merge recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, where=str(path))


def parse(text: str, where: str = "merge recipe") -> MergeRecipe:
    """Parses a recipe.

    `weight` and `density` of single models become the method's options `weights` and `density`, by expert. A
    task-arithmetic or TIES recipe with a `weight` is mergekit's (which requires it): options it leaves out then take
    mergekit's defaults (`lambda` 1, `density` 1), else ours. An entry of `models` that is the base model itself,
    without parameters, is not an expert.

    Args:
        text: YAML.
        where: how error messages call the recipe.

    Raises:
        InputError: one line, naming the recipe and the key.
    """
    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    recipe = _mapping(written, where, "the recipe")
    _known(recipe, _KEYS, where, "")
    base = _text(recipe.get("base_model"), where, "base_model")
    models, by_expert = _models(recipe.get("models"), base, where)
    name = _text(recipe.get("merge_method", "pivot"), where, "merge_method")
    dtype = _text(recipe.get("dtype"), where, "dtype")
    if dtype not in (None, *_DTYPES):
        hint = registry.nearest(dtype, _DTYPES)
        raise InputError(f"{where}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}{hint}")
    calibration = recipe.get("calibration")
    calibration = None if calibration is None else _mapping(calibration, where, "calibration")
    try:
        method = registry.find(_METHODS.get(name, name))
        parameters = _parameters(method, recipe.get("parameters"), by_expert, [n for n, _ in models], where)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    if "base" in method.needs and base is None:
        raise InputError(f"{where}: merge_method {name!r} measures updates from a base: give base_model")
    if "calibration" in method.needs and calibration is None:
        raise InputError(f"{where}: merge_method {name!r} needs calibration data: give calibration")
    return MergeRecipe(models, method.name, base, parameters, dtype, calibration)


def _models(entries: Any, base: str | None, where: str) -> tuple[tuple[tuple[str, str], ...], dict[str, dict]]:
    """Experts `(name, path)`, and the parameters they carry, `{option: {expert: value}}`."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: models must be a list of `model: PATH` entries, one for each expert")
    written = []
    for number, entry in enumerate(entries, 1):
        entry = _mapping({"model": entry} if isinstance(entry, str) else entry, where, f"models, entry {number}")
        _known(entry, _MODEL_KEYS, where, f"models, entry {number}: ")
        path = _text(entry.get("model"), where, f"models, entry {number}: model")
        if not path:
            raise InputError(f"{where}: models, entry {number} has no `model: PATH`")
        if path == base and not entry.get("parameters"):
            continue
        name = _text(entry.get("name"), where, f"models, entry {number}: name")
        written.append((name, path, entry.get("parameters")))
    if not written:
        raise InputError(f"{where}: models names no expert besides the base model")
    names = _names([name for name, _, _ in written], [path for _, path, _ in written], where)
    by_expert: dict[str, dict] = {}
    for name, (_, _, parameters) in zip(names, written):
        for option, value in _mapping(parameters or {}, where, f"parameters of {name!r}").items():
            if option not in _BY_EXPERT:
                raise InputError(f"{where}: parameters of model {name!r}: {option!r} cannot be set for one model "
                                 f"(only {' and '.join(_BY_EXPERT)}); move it to the recipe's own parameters")
            by_expert.setdefault(_BY_EXPERT[option], {})[name] = value
    return tuple(zip(names, (path for _, path, _ in written))), by_expert


def _names(given: list[str | None], paths: list[str], where: str) -> list[str]:
    """Given names, else the shortest ends of the paths that tell the experts apart."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [name or "/".join(part[-length:]) for name, part in zip(given, parts)]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise InputError(f"{where}: two models are called {twice!r}; give each a `name` of its own")


def _parameters(
    method: registry.Method, written: Any, by_expert: dict[str, dict], experts: list[str], where: str
) -> dict[str, Any]:
    given = registry.canonical(method, _mapping(written or {}, where, "parameters"))
    given = {option: value for option, value in given.items() if option not in _IGNORED}
    mergekit = "weight" in given or "weights" in by_expert
    if "weight" in given:  # for all models
        by_expert["weights"] = dict.fromkeys(experts, given.pop("weight")) | by_expert.get("weights", {})
    for option, values in by_expert.items():
        common = {} if isinstance(given.get(option), dict | None) else dict.fromkeys(experts, given[option])
        given[option] = common | values
    if mergekit:
        given = _MERGEKIT.get(method.name, {}) | given
    registry.resolve(method, given, experts)
    return given


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {what} must be a mapping of keys to values, not {type(value).__name__}")
    return {str(key): inner for key, inner in value.items()}


def _known(mapping: Mapping[str, Any], keys: tuple[str, ...], where: str, place: str) -> None:
    for key in mapping:
        if key not in keys:
            hint = registry.nearest(key, keys)
            raise InputError(f"{where}: {place}unknown key {key!r}{hint}; known: {', '.join(keys)}")


def _text(value: Any, where: str, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text, not {value!r}")
    return value
