"""Configurations: frozen dataclasses, filled from a YAML recipe and `--dotted.overrides`.

Unknown keys, wrong types and missing files are an InputError that names the key. `resolved` turns a config back into
plain YAML values, which every job saves beside its output.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from pivotjax.errors import InputError

C = TypeVar("C")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # bytes


def parse(cls: type[C], args: Sequence[str], prog: str) -> C:
    """`[RECIPE.yaml] --dotted.overrides ...` -> an instance of the dataclass `cls`; `--help` prints and exits 0."""
    args = list(args)
    recipe = args.pop(0) if args and not args[0].startswith("-") else None
    values = read_yaml(Path(recipe)) if recipe else {}
    return overridden(from_dict(cls, values, where=recipe or prog), args, prog)


def overridden(default: C, args: Sequence[str], prog: str, description: str | None = None) -> C:
    """Applies `--dotted.overrides` to an instance; tyro reads the values by the fields' types."""
    default, complaint = _with_sections(default, args), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                type(default),
                default=default,
                args=list(args),
                prog=prog,
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        line = _one_line(complaint.getvalue(), prog)
        raise InputError(line.removeprefix(f"Error parsing {type(default).__name__}: ")) from None


def _with_sections(default: C, args: Sequence[str]) -> C:
    """An optional section that is None comes into being where an option of it is given, or help is asked for."""
    named = {arg.replace("-", "_").lstrip("_").split(".")[0] for arg in args if "." in arg}
    asked = not {"-h", "--help"}.isdisjoint(args)
    sections = {}
    for name, hint in typing.get_type_hints(type(default)).items():
        kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
        if kinds and getattr(default, name) is None and (asked or name in named):
            sections[name] = kinds[0]()
    return dataclasses.replace(default, **sections)


def _one_line(box: str, prog: str) -> str:
    """tyro's error box, drawn in Unicode or ASCII -> its message and, if there is one, its suggestion, in one line."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]  # the first line is the title
    text = "\n".join("" if re.fullmatch("[╰╯─-]+", line) else line for line in lines).strip()
    message, _, rest = text.partition("\n\n")
    guess = re.search(r"Perhaps you meant:\n\s*(--\S+?),?\s", rest)
    hint = f"did you mean {guess[1]}? " if guess else ""
    return f"{' '.join(message.split()).rstrip('.')}; {hint}see `{prog} --help`"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def from_dict(cls: type[C], values: dict[str, Any], where: str) -> C:
    """A dataclass from plain values; required fields that are absent are left for the command line to give."""
    return _convert(cls, values, where, "")


def resolved(config: Any) -> Any:
    """The config as plain YAML values."""
    if dataclasses.is_dataclass(config):
        return {f.name: resolved(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): resolved(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [resolved(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML text, fields in the order of their declaration."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, key)
    if origin is Literal:
        return _check(value in arguments, value, value, f"one of {', '.join(map(str, arguments))}", where, key)
    if origin is tuple:
        _check(isinstance(value, list), value, value, "a list", where, key)
        return tuple(_convert(arguments[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), value, value, "a mapping", where, key)
        return {str(k): _convert(arguments[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float:  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError, TypeError):
            if not isinstance(value, bool):
                return float(value)
        return _check(False, value, value, "a number", where, key)
    if kind is Path:
        return Path(_check(isinstance(value, str), value, value, "a path", where, key))
    names = {int: "a whole number", str: "text", bool: "true or false"}
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _check(fits, value, value, names[kind], where, key)


def _dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    _check(isinstance(value, dict), value, value, "a mapping of keys", where, key)
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known keys: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key `{prefix}{name}`; {hint}")
    given = {name: _convert(hints[name], v, where, f"{prefix}{name}") for name, v in value.items()}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            given[field.name] = tyro.MISSING
    try:
        return kind(**given)
    except InputError as error:  # of a check in `__post_init__`, which knows neither file nor section
        raise InputError(f"{where}: {prefix}{error}") from error


def size(text: str) -> int:
    """`256MB`, `1.5 GiB` -> bytes."""
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", str(text).strip())
    try:
        return round(float(found[1]) * _UNITS[found[2].upper()])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{text!r} is no size; write 256MB or 1.5GB") from error


def check_least(config: Any, **least: float) -> None:
    """For `__post_init__`: InputError if one of the named fields of a config is below its least sensible value."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not tyro.MISSING and value < smallest:
            raise InputError(f"{name} must be at least {smallest}, not {value}")


def _check(fits: bool, result: Any, value: Any, expected: str, where: str, key: str) -> Any:
    if not fits:
        raise InputError(f"{where}: `{key}` must be {expected}, not {value!r}")
    return result
