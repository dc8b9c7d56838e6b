"""Merge recipes: YAML in mergekit's vocabulary.

```yaml
models:
  - model: out/experts/emoji.safetensors
    parameters: {weight: 0.5}
  - model: out/experts/icons.safetensors
    parameters: {weight: [0, 0.5, 1]}      # a layer gradient: first to last block
base_model: out/w0.safetensors             # or mean, or zero
merge_method: ties
parameters:
  density:
    - {filter: mlp, value: 0.5}            # tensors with `mlp` in their name
    - value: 0.2                           # all others
dtype: float32
calibration: {images: 128}
```
Only what is written here is understood; an unknown key is refused, never skipped.

**Whose defaults.** A recipe that mergekit would run means what it means there: where it gives the parameters that
mergekit requires (`weight`, or `t` of slerp; some methods require none, then it must not name an `out` or anything else
that only a job of ours has), options that it leaves out take mergekit's defaults, else ours. `defaults: mergekit` or
`defaults: pivotjax` decides it in so many words. Layer gradients, filters and the order in which settings are looked up
(the model's own, the recipe's, the default) are mergekit's everywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pivotjax.errors import InputError
from pivotjax.merging import mergekit, registry

_KEYS = ("models", "slices", "base_model", "base", "merge_method", "parameters", "dtype", "out_dtype", "calibration",
         "defaults")  # fmt: skip
_MODEL_KEYS = ("model", "name", "parameters")
_SLICE_KEYS = ("sources", "base_model", "parameters")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_WORDS = {"weight": "weights"}  # mergekit's word for an option of all our methods
_NAMES = {name: theirs.ours for name, theirs in mergekit.METHODS.items()}

Defaults = Literal["mergekit", "pivotjax"]
BASES = ("mean", "zero")  # what stands in for a base that nobody has


@dataclass(frozen=True)
class MergeRecipe:
    """A merge, described.

    Fields:
        models: the experts, `(name, path)`; paths as written in the file.
        merge_method: a registered method.
        base_model: what updates are measured from: a path, `mean` (of the experts), `zero`, or None.
        parameters: the method's options that the recipe sets (`merge(..., **parameters)`), checked; they may be
            settings (see `settings`).
        dtype: of the result: `float32`, `bfloat16`, `float16`, `float64`; None: as the checkpoints are.
        calibration: where calibration data come from; read by the job that has the models. None: no calibration.
        donor: whose format, tensor names and small files the output takes; None: the base's, else the first expert's.
        blocks: how many blocks the models must have, where the recipe says so.
        notes: what was read in another way than the file says, a sentence each.
    """

    models: tuple[tuple[str, str], ...]
    merge_method: str = "pivot"
    base_model: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    calibration: Mapping[str, Any] | None = None
    donor: str | None = None
    blocks: int | None = None
    notes: tuple[str, ...] = ()


def written(plan: MergeRecipe) -> dict[str, Any]:
    """The recipe as it would be written, everything that was read from it in so many words; `parse` reads it back."""
    models = [{"model": path, "name": name} for name, path in plan.models]
    values = {"models": models, "base_model": plan.base_model, "merge_method": plan.merge_method,
              "parameters": dict(plan.parameters), "dtype": plan.dtype, "calibration": plan.calibration}
    return {key: value for key, value in values.items() if value} | {"defaults": "pivotjax"}


def load(path: Path) -> MergeRecipe:
    """Reads a recipe file; InputError names the file and what is wrong with it."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the merge recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, where=str(path))


def parse(
    text: str, where: str = "merge recipe", defaults: Defaults | None = None, job_keys: bool = False
) -> MergeRecipe:
    """Parses a recipe.

    Parameters of single models (`weight`, `density`, ...) become the method's option with a value for each expert. An
    entry of `models` that is the base model itself, without parameters, is not an expert; in a mergekit recipe the
    method decides (`linear` merges it like any other).

    Args:
        text: YAML.
        where: how error messages call the recipe.
        defaults: whose defaults count where the recipe does not say; None: see the module.
        job_keys: the file had keys of a job beside the recipe's.

    Raises:
        InputError: one line, naming the recipe and the key.
    """
    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return _Reader(_mapping(written, "the recipe"), defaults, job_keys).recipe()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


class _Reader:
    """One recipe on its way from YAML values to a `MergeRecipe`; messages do not name the file yet."""

    def __init__(self, written: dict[str, Any], defaults: Defaults | None, job_keys: bool):
        self.notes = [f"{key} is ignored: {why}" for key, why in mergekit.IDLE_KEYS.items() if written.pop(key, None)]
        _known(written, _KEYS, "")
        self.written, self.blocks = _without_slices(written)
        self.defaults = _one_of(self.written.get("defaults", defaults), ("mergekit", "pivotjax"), "defaults")
        self.base = self._base()
        self.name = _text(self.written.get("merge_method", "pivot"), "merge_method")
        self.method = registry.find(_NAMES.get(self.name, self.name))
        self.entries = _entries(self.written.get("models"))
        self.common = _settings(self.written.get("parameters") or {}, "parameters")
        self.theirs = self._theirs(job_keys)

    def recipe(self) -> MergeRecipe:
        base, donor = self.base, None
        entries = self._experts()
        if self.theirs and self.theirs.base_is_model:
            base, donor = None, self.base
        names = _names([entry.name for entry in entries], [entry.path for entry in entries])
        parameters = self._parameters(dict(zip(names, (entry.parameters for entry in entries))))
        calibration = self.written.get("calibration")
        calibration = None if calibration is None else _mapping(calibration, "calibration")
        if "base" in self.method.needs and base is None:
            raise InputError(f"merge_method {self.name!r} measures updates from a base: give base_model (a path; mean "
                             "or zero where nobody has what the experts started from)")
        if "calibration" in self.method.needs and calibration is None:
            raise InputError(f"merge_method {self.name!r} needs calibration data: give calibration")
        models = tuple(zip(names, (entry.path for entry in entries)))
        dtype = _dtype(self.written, "out_dtype") or _dtype(self.written, "dtype")
        notes = tuple(dict.fromkeys(self.notes))
        return MergeRecipe(models, self.method.name, base, parameters, dtype, calibration, donor, self.blocks, notes)

    def _base(self) -> str | None:
        if "base" in self.written and "base_model" in self.written:
            raise InputError("base and base_model are the same; give one")
        return _text(self.written.get("base_model", self.written.get("base")), "base_model")

    def _theirs(self, job_keys: bool) -> mergekit.Theirs | None:
        """mergekit's reading of the method, if this is a recipe of mergekit's."""
        theirs = mergekit.METHODS.get(self.name)
        if self.defaults == "pivotjax" or (theirs is None and self.defaults is None):
            return None
        if theirs is None:
            raise InputError(f"defaults: mergekit: it has no method {self.name!r}")
        given = {*self.common, *(word for entry in self.entries for word in entry.parameters)}
        runs_there = given.issuperset(theirs.required) and (theirs.required or not job_keys)
        return theirs if self.defaults == "mergekit" or runs_there else None

    def _experts(self) -> list["_Entry"]:
        """The models that are merged, without the base where the method only measures from it."""
        base = [entry for entry in self.entries if entry.path == self.base]
        others = [entry for entry in self.entries if entry.path != self.base]
        if self.theirs and self.theirs.base_is_model and self.base:
            if not base and self.common.keys() >= set(self.theirs.required):  # mergekit adds it to the models
                base = [_Entry(None, self.base, {})]
            return [*base, *others]  # slerp starts at the base
        found = self.entries if not self.theirs and any(entry.parameters for entry in base) else others
        if not found:
            raise InputError("models names no expert besides the base model")
        return found

    def _parameters(self, own: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The method's options: the recipe's settings, and those of single models by expert."""
        common = self._in_our_words(self.common)
        own = {name: self._in_our_words(settings) for name, settings in own.items()}
        fallback = dict(self.theirs.defaults) if self.theirs else {}
        given = dict.fromkeys(option for settings in (common, *own.values()) for option in settings)
        left_out = [option for option in fallback if option not in given]
        if left_out:
            said = ", ".join(f"{option} = {fallback[option]}" for option in left_out)
            self.notes.append(f"read as a recipe of mergekit's (`defaults: pivotjax` says otherwise): {said}")
        options = {option: _chain(common.get(option), fallback.get(option)) for option in {**common, **fallback}}
        for option in (option for option in given if any(option in settings for settings in own.values())):
            if option in self.method.options and not self.method.takes_experts(option):
                name = next(name for name, settings in own.items() if option in settings)
                raise InputError(f"parameters of model {name!r}: {option!r} cannot be set for one model; move it to "
                                 "the recipe's own parameters")
            options[option] = self._by_expert(option, own, options.get(option))
        if not isinstance(options.get("weights"), Mapping | None):  # one for all models, as mergekit writes it
            options["weights"] = self._by_expert("weights", own, options["weights"])
        registry.resolve(self.method, options, list(own))
        return options

    def _by_expert(self, option: str, own: dict[str, dict[str, Any]], common: Any) -> dict[str, Any]:
        """`{expert: setting}`; an expert's own, else the recipe's, else the method's default where that is a number."""
        if isinstance(common, Mapping):
            return {**common, **{name: _chain(settings[option], common.get(name)) for name, settings in own.items()
                                 if option in settings}}
        default = self.method.options.get(option)
        common = _chain(common, default if isinstance(default, (int, float)) else None)
        values = {name: _chain(settings.get(option), common) for name, settings in own.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _in_our_words(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.notes += [f"{word} is ignored: {mergekit.IDLE[word]}" for word in settings if word in mergekit.IDLE]
        settings = {word: value for word, value in settings.items() if word not in mergekit.IDLE}
        if self.theirs:
            settings, notes = self.theirs.in_our_words(settings)
            self.notes += notes
        return registry.canonical(self.method, {_WORDS.get(word, word): value for word, value in settings.items()})


@dataclass(frozen=True)
class _Entry:
    """One entry of `models`."""

    name: str | None
    path: str
    parameters: dict[str, Any]


def _entries(written: Any) -> list[_Entry]:
    if not isinstance(written, list) or not written:
        raise InputError("models must be a list of `model: PATH` entries, one for each expert")
    entries = []
    for number, entry in enumerate(written, 1):
        place = f"models, entry {number}"
        entry = _mapping({"model": entry} if isinstance(entry, str) else entry, place)
        _known(entry, _MODEL_KEYS, f"{place}: ")
        path = _text(entry.get("model"), f"{place}: model")
        if not path:
            raise InputError(f"{place} has no `model: PATH`")
        if path.endswith((".yaml", ".yml")):
            raise InputError(f"{place}: {path} is a recipe, not a model; merge it first and give its output folder")
        parameters = _settings(entry.get("parameters") or {}, f"{place}: parameters")
        entries.append(_Entry(_text(entry.get("name"), f"{place}: name"), path, parameters))
    return entries


def _without_slices(written: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A recipe with one slice of whole models as one with `models`, and how many blocks they must have."""
    if "slices" not in written:
        return written, None
    slices = written["slices"]
    if "models" in written or not isinstance(slices, list) or len(slices) != 1:
        raise InputError("slices: only a single slice of whole models can be merged (no cutting and stacking of "
                         "layers); write `models` instead")
    only = _mapping(slices[0], "slices, entry 1")
    _known(only, _SLICE_KEYS, "slices, entry 1: ")
    sources = [_mapping(source, "slices: sources") for source in only.get("sources") or []]
    ranges = [source.get("layer_range") for source in sources]
    if not ranges or any(r != ranges[0] or not _whole(r) for r in ranges):
        raise InputError(f"slices: layer_range must be [0, number of layers], the same for all models, not {ranges}; "
                         "cutting layers out of models is not supported")
    models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    rest = {key: value for key, value in written.items() if key != "slices"}
    parameters = (rest.get("parameters") or {}) | (only.get("parameters") or {})
    base = {"base_model": only["base_model"]} if only.get("base_model") else {}
    return rest | {"models": models, "parameters": parameters} | base, ranges[0][1]


def _whole(layer_range: Any) -> bool:
    return isinstance(layer_range, list) and len(layer_range) == 2 and layer_range[0] == 0 and layer_range[1] > 0


def _settings(written: Any, place: str) -> dict[str, Any]:
    """Parameters as written, with a lone `value:` entry as a list, and numbers as numbers."""
    return {word: _setting(value) for word, value in _mapping(written, place).items()}


def _setting(value: Any) -> Any:
    if isinstance(value, Mapping) and "value" in value and set(value) <= {"filter", "value"}:
        return _setting([value])
    if isinstance(value, Mapping):
        return {str(key): _setting(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [dict(entry) | {"value": _setting(entry["value"])} if isinstance(entry, Mapping) and "value" in entry
                else _setting(entry) for entry in value]
    # YAML 1.1 reads 1e-5 as text.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _chain(setting: Any, rest: Any) -> Any:
    """A setting, and what counts where none of its filters fits."""
    if setting is None or rest is None:
        return rest if setting is None else setting
    filters = isinstance(setting, list) and setting and all(isinstance(entry, Mapping) for entry in setting)
    if not filters or any(entry.get("filter") in (None, "*") for entry in setting):
        return setting
    more = isinstance(rest, list) and rest and all(isinstance(entry, Mapping) for entry in rest)
    return [*setting, *(rest if more else [{"value": rest}])]


def _names(given: list[str | None], paths: list[str]) -> list[str]:
    """Given names, else the shortest ends of the paths that tell the experts apart."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [name or "/".join(part[-length:]) for name, part in zip(given, parts)]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise InputError(f"two models are called {twice!r}; give each a `name` of its own")


def _dtype(written: Mapping[str, Any], key: str) -> str | None:
    dtype = _text(written.get(key), key)
    return None if dtype is None else _one_of(dtype.removeprefix("torch."), _DTYPES, key)


def _one_of(word: Any, words: tuple[str, ...], what: str) -> Any:
    if word not in (None, *words):
        raise InputError(f"{what} {word!r} is not one of {', '.join(words)}{registry.nearest(word, words)}")
    return word


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a mapping of keys to values, not {type(value).__name__}")
    return {str(key): inner for key, inner in value.items()}


def _known(mapping: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in mapping:
        if key not in keys:
            hint = registry.nearest(key, keys)
            raise InputError(f"{place}unknown key {key!r}{hint}; known: {', '.join(keys)}")


def _text(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{what} must be text, not {value!r}")
    return value
