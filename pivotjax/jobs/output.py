"""A job's output folder: claimed for one config, never silently mixed with another's."""

from pathlib import Path
from typing import Any

from pivotjax import config as configs
from pivotjax import files
from pivotjax.errors import InputError

_NOT_COMPARED = ("out", "cache", "workers")  # where things lie, and who makes them, changes nothing about what they are


def claim(out: Path, config: Any) -> None:
    """Makes `out` and saves the resolved config there; InputError if another config's output is in it.

    A config alone, left by a run that ended before it wrote anything, is no output.
    """
    files.output_folder(out)
    check(out, config)
    files.write_bytes(out / "config.yaml", configs.to_yaml(config).encode())


def check(out: Path, config: Any) -> None:
    """InputError if another config's output is in `out`."""
    saved = out / "config.yaml"
    if saved.exists() and any(path != saved for path in out.iterdir()):
        before, now = _flat(configs.read_yaml(saved)), _flat(configs.resolved(config))
        for key in sorted(before.keys() | now.keys()):
            if key.split(".")[0] not in _NOT_COMPARED and before.get(key) != now.get(key):
                raise InputError(
                    f"{out} holds output made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                    "give another --out, or remove that folder"
                )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    items = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
    return {key: value for item in items for key, value in item.items()}
