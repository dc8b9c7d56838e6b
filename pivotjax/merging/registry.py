"""The registry of merge methods: a method is one decorated function, its options are its keyword-only arguments.

```python
@method("average", family="elementwise", source="...", laws={...})
def average(updates: Updates, *, weights: ExpertWeights = None, scale: Positive = 1.0) -> Merged: ...
```
An option's annotation is its check: `Literal[...]` lists the words, `Annotated[float, Bounds(...)]` the range.
"""

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import jax

from pivotjax.errors import InputError
from pivotjax.merging import settings


@dataclass(frozen=True)
class Bounds:
    """Range of a number: `low <= x <= high`, or `low < x` where `open_low`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else "any number"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Fraction = Annotated[float, Bounds(0, 1, open_low=True)]  # (0, 1]
Share = Annotated[float, Bounds(0, 1)]  # [0, 1]
Positive = Annotated[float, Bounds(0, open_low=True)]
NotNegative = Annotated[float, Bounds(0)]
Count = Annotated[int, Bounds(1)]
ExpertValues = Mapping[str, float]  # one number for each expert, by name


class Merged(NamedTuple):
    """What a method returns.

    `leaves`: the merged *update*, one array a leaf in the layout's order (the caller adds the base);
    `layers`: what it has to report, `{layer label: {...}}`, numbers, words and arrays (traced ones too: nothing that
    is reported may force a value); `options`: those it chose itself; `exceptions`: leaves to which its formula does not
    apply, and what was done instead, `{leaf path: sentence}`; `facts`: what it has to report of the merge as a whole.
    """

    leaves: list[jax.Array]
    layers: Mapping[str, dict] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    exceptions: Mapping[str, str] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})


Need = Literal["base", "calibration", "randomness"]
# What must be in memory together: one tensor; a layer's weight and bias; everything.
Scope = Literal["tensor", "layer", "model"]


@dataclass(frozen=True)
class Method:
    """A registered merge method."""

    name: str
    family: str
    source: str
    needs: tuple[Need, ...]
    scope: Scope | Callable[[Mapping[str, Any]], Scope]
    laws: Mapping[str, Mapping[str, Any]]  # law -> the options at which it holds
    function: Callable[..., Merged]
    options: Mapping[str, Any]  # option -> default
    types: Mapping[str, Any]  # option -> annotation

    @property
    def takes_calibration(self) -> bool:
        return "calibration" in inspect.signature(self.function).parameters

    def scope_at(self, options: Mapping[str, Any]) -> Scope:
        """What the method must see together at these (resolved) options."""
        return self.scope if isinstance(self.scope, str) else self.scope(options)

    def takes_experts(self, option: str) -> bool:
        """Whether the option may have a value for each expert."""
        return ExpertValues in _alternatives(self.types[option])

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]


METHODS: dict[str, Method] = {}
ALIASES = {"lambda": "scale"}  # `lambda` is a reserved word in Python; YAML and the command line may use it
LAWS = {
    "identical": "identical experts return that expert",
    "order": "the order of the experts is irrelevant",
    "homogeneous": "a common rescaling of all updates rescales the merged update",
    "average": "equals the plain average",
    "single": "one expert alone is returned",
    "zero": "experts equal to the base give the base",
    "idle": "an expert equal to the base changes nothing",
}


def method(
    name: str,
    *,
    family: str,
    source: str,
    needs: tuple[Need, ...] = (),
    scope: Scope | Callable[[Mapping[str, Any]], Scope] = "layer",
    laws: Mapping[str, Mapping[str, Any]],
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Registers a merge method.

    Args:
        name: the word users type.
        family: the kind of method, for the listing.
        source: where its definition comes from: paper and formula, or [ours].
        needs: what must be given at any options; a method that needs more at some options checks that itself.
            `randomness`: it draws numbers, keyed to its option `seed`, the expert's name and the leaf's path.
        scope: `tensor`: each leaf is merged alone; `layer`: a weight with its bias; `model`: all leaves together
            (then it cannot be streamed, nor have options that differ a tensor); or a function of the options.
        laws: which of `LAWS` hold, each with the options at which it does ({}: the defaults).
    """

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "calibration"}
        hints = typing.get_type_hints(function, include_extras=True)
        types = {option: hints[option] for option in options}
        METHODS[name] = Method(name, family, source, needs, scope, dict(laws), function, options, types)
        return function

    return register


def find(name: str) -> Method:
    """The method of that name; InputError lists the known ones and the nearest."""
    if name not in METHODS:
        raise InputError(f"unknown merge method {name!r}{nearest(name, METHODS)}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def resolve(chosen: Method, options: Mapping[str, Any], experts: Sequence[str] = ()) -> dict[str, Any]:
    """The method's options with defaults filled in.

    Args:
        chosen: the method.
        options: what the user gave; `lambda` stands for `scale`.
        experts: names that options with a value for each expert must cover; empty: not checked yet.

    Raises:
        InputError: an unknown option, or a value that its annotation does not allow.
    """
    given = canonical(chosen, options)
    for option, value in given.items():
        if option not in chosen.options:
            known = ", ".join(chosen.options)
            raise InputError(f"merge method {chosen.name!r} has no option {option!r}"
                             f"{nearest(option, chosen.options)}; its options: {known}")
        problem = _mismatch(value, chosen.types[option], experts)
        if problem:
            raise InputError(f"merge method {chosen.name!r}, option {option!r}: {problem}")
    return {option: given.get(option, default) for option, default in chosen.options.items()}


def canonical(chosen: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under their own names (`lambda` -> `scale`); InputError where one is given twice."""
    given = {ALIASES.get(option, option): value for option, value in options.items()}
    if len(given) < len(options):
        raise InputError(f"merge method {chosen.name!r}: give either scale or lambda, they are the same option")
    return given


def describe() -> list[dict[str, Any]]:
    """All methods for a listing: name, family, summary, source, needs, options (default and allowed values), laws."""
    return [
        {
            "name": m.name,
            "family": m.family,
            "summary": m.summary,
            "source": m.source,
            "needs": list(m.needs),
            "scope": m.scope_at(m.options),
            "options": {o: {"default": d, "allowed": _spell(m.types[o])} for o, d in m.options.items()},
            "laws": {law: dict(options) for law, options in m.laws.items()},
        }
        for m in sorted(METHODS.values(), key=lambda m: m.name)
    ]


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, type(int | None)) else (annotation,)


def _mismatch(value: Any, annotation: Any, experts: Sequence[str]) -> str | None:
    """Why `value` is not one of the annotation's alternatives (the one it was meant for); None where it is."""
    if isinstance(value, list):  # differs a tensor: every value that it can take is checked
        return settings.problem(value) or _first(_mismatch(v, annotation, experts) for v in settings.values(value))
    if isinstance(value, Mapping) and any(isinstance(v, list) for v in value.values()):
        broken = _first(settings.problem(v) for v in value.values() if isinstance(v, list))
        if broken:
            return broken
        some = {name: settings.values(v)[0] for name, v in value.items()}
        return _first(_mismatch(some | {name: inner}, annotation, experts)
                      for name, v in value.items() for inner in settings.values(v))
    alternatives = _alternatives(annotation)
    problems = [_mismatch_one(value, alternative, experts) for alternative in alternatives]
    meant = alternatives.index(ExpertValues) if isinstance(value, Mapping) and ExpertValues in alternatives else 0
    return None if None in problems else problems[meant]


def _first(problems: typing.Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _mismatch_one(value: Any, annotation: Any, experts: Sequence[str]) -> str | None:
    if annotation is type(None):
        return None if value is None else "must be absent"
    if typing.get_origin(annotation) is Literal:
        words = typing.get_args(annotation)
        return None if value in words else f"{value!r} is not one of {', '.join(words)}{nearest(value, words)}"
    if typing.get_origin(annotation) is Annotated:
        kind, bounds = typing.get_args(annotation)
        problem = _mismatch_one(value, kind, experts)
        return problem or (None if value in bounds else f"{value!r} must be {bounds}")
    if annotation == ExpertValues:
        return _mismatch_experts(value, experts)
    if annotation is bool:
        return None if isinstance(value, bool) else f"{value!r} must be true or false"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return None if number and int(value) == value else f"{value!r} must be a whole number"
    return None if number else f"{value!r} must be a number"


def _mismatch_experts(value: Any, experts: Sequence[str]) -> str | None:
    if not isinstance(value, Mapping):
        return f"{value!r} must give one number for each expert, by name"
    for name, number in value.items():
        if experts and name not in experts:
            return f"no expert is called {name!r}{nearest(name, experts)}"
        if _mismatch_one(number, float, ()):
            return f"{number!r} of expert {name!r} must be a number"
    missing = [name for name in experts if name not in value]
    return f"no value for expert {missing[0]!r}" if missing else None


def _spell(annotation: Any) -> str:
    return " or ".join(_spell_one(alternative) for alternative in _alternatives(annotation))


def _spell_one(annotation: Any) -> str:
    if annotation is type(None):
        return "absent"
    if typing.get_origin(annotation) is Literal:
        return " | ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is Annotated:
        kind, bounds = typing.get_args(annotation)
        return f"{'whole number' if kind is int else 'number'} {bounds}"
    if annotation == ExpertValues:
        return "a number for each expert"
    return {bool: "true | false", int: "whole number", float: "number"}[annotation]
