"""Orbax checkpoints of projectors, with what is needed to trust them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from pivotjax import files
from pivotjax.errors import InputError
from pivotjax.models import projector

FORMAT = 1
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file
_SIZES = "sizes.json"  # of all other files of a checkpoint, in bytes
_DISK = {  # what is said: signs of it in the texts of Orbax' and TensorStore's errors
    "no space left; free some space or choose another folder": (
        "No space left", "File too large", "Disk quota", "Errno 28", "Errno 27"
    ),
    "it may not be written to; choose another folder": (
        "Read-only file system", "Permission denied", "PERMISSION_DENIED", "Not a directory"
    ),
    "it went away meanwhile; see that its disk is mounted": ("No such file or directory", "directory does not exist"),
}  # fmt: skip


class Projector(NamedTuple):
    """A projector read from disk."""

    params: projector.Params
    info: dict[str, Any]  # format, name, init_id, fingerprint, config, versions, backbone, ...


def save_projector(path: Path, params: projector.Params, info: dict[str, Any]) -> None:
    """Writes one projector as an Orbax checkpoint folder, whole or not at all, replacing what was there.

    `info` (JSON) travels in the checkpoint's metadata; `format` and the parameters' `fingerprint` are added. Of several
    processes the one that calls it writes; parameters are on its host.
    """
    info = {"format": FORMAT, "fingerprint": projector.fingerprint(params)} | info
    with disk_errors(path), files.atomic_path(path) as temporary, _by_this_process_alone():
        ocp.save(temporary.absolute(), params, custom_metadata=info)
        note_sizes(temporary)


@contextlib.contextmanager
def _by_this_process_alone() -> Iterator[None]:
    """Orbax as in a run of one process: of several, each would wait for the others to save the same.

    Its option `active_processes` is for this, but a save compares paths with all processes whatever that says (0.12).
    """
    count, jax.process_count = jax.process_count, lambda: 1
    try:
        yield
    finally:
        jax.process_count = count


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint, of whatever."""
    return (path / _METADATA).exists()


def custom_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself beside its arrays; empty where there is no Orbax checkpoint."""
    if not is_orbax(path):
        return {}
    try:
        return ocp.metadata(path.absolute() if isinstance(path, Path) else path).custom_metadata or {}
    except Exception as error:
        raise damaged(path) from error


def projector_info(path: Path) -> dict[str, Any]:
    """The `info` of a projector checkpoint, without reading its arrays."""
    return _metadata(path).custom_metadata


def load_projector(path: Path) -> Projector:
    """Reads a projector and checks its bytes against its fingerprint."""
    metadata = _metadata(path)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), metadata.metadata)
    try:
        params = ocp.load(path.absolute(), abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise damaged(path) from error
    if projector.fingerprint(params) != metadata.custom_metadata["fingerprint"]:
        raise damaged(path)
    return Projector(params, metadata.custom_metadata)


def _metadata(path: Path) -> Any:
    if not path.is_dir():
        raise InputError(f"no checkpoint at {path}; give the folder of a projector checkpoint")
    if not complete(path):
        raise damaged(path)
    try:
        metadata = ocp.metadata(path.absolute())
    except Exception as error:
        raise damaged(path) from error
    if "fingerprint" not in (metadata.custom_metadata or {}):
        raise InputError(f"{path} is not a projector checkpoint of pivotjax (its metadata names no fingerprint)")
    return metadata


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def note_sizes(folder: Path) -> None:
    """Notes the sizes of a checkpoint's files, so that `complete` can tell."""
    files.write_json(folder / _SIZES, _sizes(folder))


def complete(folder: Path) -> bool:
    """False where a file is missing or truncated; asked before Orbax's threads stumble over it, each with a trace.

    InputError or OSError where the disk cannot be read.
    """
    if not (folder / _SIZES).is_file():
        return True  # the process ended between the save and this note on it
    try:
        saved, found = files.read_json(folder / _SIZES), _sizes(folder)
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # the disk's fault
            raise
        return False
    return all(found.get(name) == size for name, size in saved.items())


def damaged(path: Path) -> InputError:
    """The error for a checkpoint that cannot be read."""
    return InputError(f"{path} is not a whole Orbax checkpoint (truncated or damaged); save or copy it again")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Around writing: a disk that is full, read-only or taken away is the user's to mend, and no bug."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        for said, signs in _DISK.items():
            if any(sign in text for sign in signs):
                raise InputError(f"cannot write {path}: {said}") from error
        raise
