"""Files that are whole or absent: atomic writes, hashes, output folders."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from pivotjax.errors import InputError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def within(folder: Path, name: str) -> Path:
    """A file of a downloaded folder, by its name; InputError if that would lead out of the folder.

    Links are followed inside the folder, and in a cache of the Hugging Face hub inside the repository's own folder
    (`models--OWNER--NAME/snapshots/REVISION/FILE` is a link to `models--OWNER--NAME/blobs/HASH`).
    """
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise InputError(f"{folder} names the file {name!r}, which is not inside it; get the model again")
    path, home = folder / name, folder.resolve()
    root = home.parent.parent if home.parent.name == "snapshots" else home
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a link out of its folder; copy the file itself there if it is meant")
    return path


def check_links(folder: Path) -> None:
    """InputError if a link in a downloaded folder leads out of it."""
    for path in folder.iterdir():
        if path.is_symlink():
            within(folder, path.name)


def output_folder(path: Path) -> Path:
    """Makes `path` a folder that can be written to; InputError says why where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
    return path


@contextlib.contextmanager
def plain_errors(path: str) -> Iterator[None]:
    """Around use of a path: OSError for whatever a bucket's client raises; InputError where there is none."""
    try:
        yield
    except ImportError as error:
        raise InputError(f'{path} needs gcsfs: pip install "pivotjax[gcs]"') from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # every client has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def atomic_path(path: Path, keep: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path` (file or folder, up to the caller) and renames it there on success.

    On any failure the temporary is removed and what was at `path` stays. A full disk becomes an InputError.
    `keep`: a folder that is at `path` by then stays, and the temporary goes: another process made the same, and
    others may have mapped its files. What a process of this host that was killed has left of `path` is removed.
    """
    path = Path(path)
    output_folder(path.parent)
    work, lock = _work_folder(path)
    temporary = work / path.name
    try:
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.is_dir() and not keep:
            path.rename(work / "replaced")
        try:
            os.replace(temporary, path)
        except OSError as error:
            if not (keep and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _work_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the open file that locks it: the lock ends with this process, however it ends."""
    prefix = f".{path.name}.{socket.gethostname()}-"  # a lock may not be seen by other hosts
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_left(left, path.name)
    while True:
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(work, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a disk without locks: nothing is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if work.exists():
                return work, lock
            os.close(lock)  # it was taken for one that was left, before it was locked


def _remove_left(work: Path, name: str) -> None:
    """Removes a work folder that no process holds, but one with what stood at its path before."""
    with contextlib.suppress(OSError):
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if set(os.listdir(work)) <= {name}:
                shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value) -> None:
    """Writes JSON atomically; NaN and infinity become null, so that every JSON reader accepts the file."""
    write_bytes(path, (json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path):
    """Reads JSON; InputError where the file is missing or broken."""
    try:
        return json.loads(epath.Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); write it again") from error


def _finite(value):
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _finite(value.tolist())
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
