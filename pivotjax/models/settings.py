"""The fields of a model's config.json, each checked as it is read."""

from collections.abc import Mapping
from typing import Any

from pivotjax.errors import InputError

_LARGEST_SIZE, _LARGEST_NUMBER = 1 << 24, 1e15  # no model comes near, and nothing made from them overflows
_SHOWN = 60  # characters of a value in an error


class Settings:
    """Fields of a config.json (or of a part of it). InputError names the field, its value and the file."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        if not isinstance(fields, Mapping):
            raise InputError(f"{where} is not a mapping of fields; get the model's config.json again")
        self.fields, self.where = fields, where

    def get(self, name: str) -> Any:
        """A field as it stands; None where it is absent."""
        return self.fields.get(name)

    def part(self, name: str) -> "Settings":
        """The fields below one field; none where it is absent."""
        return Settings(self.get(name) or {}, f"{self.where}, {name}")

    def size(self, name: str, least: int = 1, most: int = _LARGEST_SIZE) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return value

    def size_or_none(self, name: str) -> int | None:
        """The same, where absent and null have a meaning."""
        return None if self.get(name) is None else self.size(name)

    def number(self, name: str, above: float = 0.0) -> float:
        """A number greater than `above`."""
        value = self.get(name)
        if type(value) not in (int, float) or not above < value <= _LARGEST_NUMBER:
            raise self._wrong(name, f"a number above {above:g}")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A number above 0 where absent and null have a meaning."""
        return None if self.get(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers above 0."""
        values = self.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise self._wrong(name, f"a list of {count} numbers")
        return tuple(Settings({name: value}, self.where).number(name) for value in values)

    def flag(self, name: str) -> bool:
        """True or false; false where it is absent."""
        value = self.get(name)
        if value not in (None, True, False):
            raise self._wrong(name, "true or false")
        return bool(value)

    def one_of(self, name: str, *known: Any) -> Any:
        """A field with one of the values that are supported."""
        value = self.get(name)
        if value not in known:
            raise self.unsupported(name, f"known: {', '.join(map(str, known))}")
        return value

    def unsupported(self, name: str, hint: str) -> InputError:
        """The error for a field whose value asks for what is not there."""
        return InputError(f"{self.where}: {name} {self._shown(name)} is not supported ({hint}); choose another model")

    def _wrong(self, name: str, wanted: str) -> InputError:
        if self.get(name) is None:
            return InputError(f"{self.where} has no field {name!r}; get the model's config.json again")
        found = self._shown(name)
        return InputError(f"{self.where}: {name} is {found}, not {wanted}; get the model's config.json again")

    def _shown(self, name: str) -> str:
        text = repr(self.get(name))
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
