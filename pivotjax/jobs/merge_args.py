"""The command line of `pivotjax merge`: a recipe with overrides, or a method with its options as flags.

Both end as the values of one recipe. What belongs to the job (`--out`, `--chunk`, ...) is left to `config.overridden`;
the rest are words of recipes (`--base`, `--dtype`), the method's options (`--density 0.2`), and those written out
(`--parameters.density 0.2`).
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from pivotjax.errors import InputError
from pivotjax.merging import METHODS, registry

_RECIPE = {
    "method": "merge_method", "merge_method": "merge_method", "base": "base_model", "base_model": "base_model",
    "dtype": "dtype", "out_dtype": "out_dtype", "defaults": "defaults", "experts": "models", "parameters": "parameters",
}  # fmt: skip
_OPTION_WORDS = {"weight": "weights"} | registry.ALIASES
_NAMES = {"linear": "average"}  # mergekit's word for a method of ours


class _Flag:
    """One `--flag` and the values after it."""

    def __init__(self, written: str, values: list[str]):
        self.written, self.values = written, values
        self.path = written.removeprefix("--").replace("-", "_").split(".")

    @property
    def root(self) -> str:
        return self.path[0]

    def value(self) -> Any:
        """One value, a list of several, or a mapping where each is `name=value`."""
        if not self.values:
            raise InputError(f"{self.written} has no value; give one after it")
        parts = [text.partition("=") for text in self.values]
        if all(cut for _, cut, _ in parts):
            return {name: self._parsed(text) for name, _, text in parts}
        found = [self._parsed(text) for text in self.values]
        return found[0] if len(found) == 1 else found

    def _parsed(self, text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{self.written}: {text!r} is not valid YAML; give a number, a word or a list like [1, 2]"
                             ) from error


def split(args: list[str], written: dict[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Applies a command line to the values of a recipe.

    Args:
        args: what follows the recipe's path.
        written: the recipe's values.
        own: the job's options, which are handed on.

    Returns:
        The recipe's values with what the command line says, and the arguments that are the job's.

    Raises:
        InputError: an option that neither the job, nor recipes, nor the method have, with the nearest that one of
            them has.
    """
    own, values, rest = set(own), dict(written), []
    flags = list(_flags(args))
    name = _word([f for f in flags if _RECIPE.get(f.root) == "merge_method"], values.get("merge_method", "pivot"))
    method = METHODS.get(_NAMES.get(name, name))
    options = {} if method is None else {option: option for option in method.options} | {
        word: option for word, option in _OPTION_WORDS.items() if option in method.options}
    for flag in flags:
        option = flag.root.removeprefix("no_") if flag.root not in options else flag.root
        if not flag.written.startswith("--") or {flag.root, flag.root.removeprefix("no_")} & own or flag.root == "help":
            rest += [flag.written, *flag.values]
        elif flag.root == "experts":
            values["models"] = [_expert(text) for text in flag.values]
        elif flag.root == "parameters":
            values["parameters"] = _with(values, ".".join(flag.path[1:]), flag.value())
        elif flag.root in _RECIPE:
            values[_RECIPE[flag.root]] = _text(flag)
            if _RECIPE[flag.root] == "base_model":
                values.pop("base", None)
        elif option in options:
            values["parameters"] = _with(values, options[option], _option_value(flag, option))
        else:
            known = [*own, *(word for word in _RECIPE if word != "parameters"), *options]
            of = f"merge method {name!r}" if method else "merge"
            raise InputError(f"{of} has no option {flag.written}{_nearest(flag.root, known)}; "
                             f"see `pivotjax merge --method {name} --help`")
    return values, rest


def asked_method(args: list[str]) -> str | None:
    """The method that a command line names."""
    return _word([f for f in _flags(args) if _RECIPE.get(f.root) == "merge_method"], None)


def _flags(args: list[str]) -> Iterator[_Flag]:
    """Flags with the values up to the next flag; `--flag=value` too; what stands before the first is its own."""
    held: list[list[str]] = []
    for arg in args:
        if arg.startswith("-") and not _is_number(arg):
            flag, cut, attached = arg.partition("=")
            held.append([flag, *([attached] if cut else [])])
        elif held:
            held[-1].append(arg)
        else:
            held.append([arg])
    return (_Flag(first, rest) for first, *rest in held)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _word(flags: list[_Flag], default: Any) -> Any:
    return _text(flags[-1]) if flags else default


def _text(flag: _Flag) -> str:
    if len(flag.values) != 1:
        raise InputError(f"{flag.written} has no value; give one after it" if not flag.values else
                         f"{flag.written} takes one value, not {len(flag.values)}")
    return flag.values[0]


def _expert(text: str) -> dict[str, str]:
    """`PATH` or `NAME=PATH`."""
    name, cut, path = text.partition("=")
    return {"name": name, "model": path} if cut and "/" not in name else {"model": text}


def _with(values: dict[str, Any], option: str, value: Any) -> dict[str, Any]:
    """The recipe's parameters with one more; a name given before under another spelling goes."""
    given = {word: v for word, v in (values.get("parameters") or {}).items()
             if _OPTION_WORDS.get(word, word) != _OPTION_WORDS.get(option, option)}
    return given | {option: value}


def _option_value(flag: _Flag, option: str) -> Any:
    """A truth value may be given as `--normalize` or `--no-normalize`."""
    if flag.root != option:
        return False
    return True if not flag.values else flag.value()


def _nearest(word: str, known: Iterable[str]) -> str:
    spelled = [f"--{name.replace('_', '-')}" for name in known]
    close = difflib.get_close_matches(f"--{word.replace('_', '-')}", spelled, n=1)
    return f"; did you mean {close[0]}?" if close else ""
