"""A job's output folder: claimed for one config, never silently mixed with another's."""

from pathlib import Path
from typing import Any

from pivotjax import config as configs
from pivotjax import files
from pivotjax.errors import InputError

# Where things lie, who makes them and on what devices changes nothing about what they are. (What a scenario or corpora
# hold does: training checkpoints carry its hash.)
_NOT_COMPARED = (
    "out", "cache", "workers", "data.workers", "data.scenario", "data.corpora",
    "checkpoints", "metrics", "mesh", "parallel", "hosts",
    "training.accumulate", "training.device_batch", "training.remat", "training.loss_chunk", "training.attention",
    "training.log_every",
)  # fmt: skip


def claim(out: Path, config: Any, free: tuple[str, ...] = ()) -> None:
    """Makes `out` and saves the resolved config there; InputError if another config's output is in it.

    A config alone, left by a run that ended before it wrote anything, is no output. `free` are keys that may have
    changed: of stages that are run anew each time, or for which something else is compared.
    """
    if str(out).startswith("gs:/"):
        raise InputError(f"out is a folder on a disk, not {out}; a bucket can hold checkpoints (checkpoints.folder)")
    files.output_folder(out)
    check(out, config, free)
    files.write_bytes(out / "config.yaml", configs.to_yaml(config).encode())


def check(out: Path, config: Any, free: tuple[str, ...] = ()) -> None:
    """InputError if another config's output is in `out`; `free` as for `claim`."""
    saved = out / "config.yaml"
    if saved.exists() and any(path != saved for path in out.iterdir()):
        before, now = (_compared(values, free) for values in (configs.read_yaml(saved), configs.resolved(config)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{out} holds output made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                    "give another --out, or remove that folder"
                )


def compared(config: Any, free: tuple[str, ...] = ()) -> dict[str, Any]:
    """A config's values by dotted key, without those that change nothing about its output; `free` as for `claim`."""
    return _compared(configs.resolved(config), free)


def _compared(values: dict[str, Any], free: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flat(values).items()
        if not any(key == one or key.startswith(f"{one}.") for one in (*_NOT_COMPARED, *free))
    }


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    items = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
    return {key: value for item in items for key, value in item.items()}
