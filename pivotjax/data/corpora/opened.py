"""Files kept open: as many as last used, in each process its own, usable from several threads."""

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import BinaryIO, Generic, TypeVar

import fsspec

from pivotjax.files import plain_errors

T = TypeVar("T")


class Opened(Generic[T]):
    """What `open` gives for a key; the `most` last used are kept. Travels to other processes empty.

    A key is opened once, by the thread that asks first; others that ask meanwhile wait for it, or for its error.

    Nothing is closed by hand: another thread may still read from what has just been pushed out.
    """

    def __init__(self, open: Callable[..., T], most: int):
        self._open, self._most = open, most
        self._kept: OrderedDict[tuple, Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, *key) -> T:
        with self._lock:
            is_first = key not in self._kept
            opened = self._kept.setdefault(key, Future())
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        if is_first:
            self._fulfil(opened, key)
        return opened.result()

    def _fulfil(self, opened: Future, key: tuple) -> None:
        try:
            opened.set_result(self._open(*key))
        except BaseException as error:
            with self._lock:  # who asks next tries again
                if self._kept.get(key) is opened:
                    del self._kept[key]
            opened.set_exception(error)

    def __reduce__(self):
        return Opened, (self._open, self._most)


class LocalFile:
    """Ranges of a regular file on a local or mounted disk; OSError where it cannot be read."""

    def __init__(self, path: str):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("not a file")
        self._file = open(path, "rb", buffering=0)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; fewer where the file ends."""
        return os.pread(self._file.fileno(), size, start)


class RemoteFile:
    """Ranges of a file in a bucket, a request each; OSError where it cannot be read."""

    def __init__(self, path: str):
        with plain_errors(path):
            self._system, self._path = fsspec.core.url_to_fs(path)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; fewer where the file ends."""
        with plain_errors(self._path):
            return self._system.cat_file(self._path, start=start, end=start + size)


def is_remote(path: str) -> bool:
    """Whether it is in a bucket (gs://)."""
    return "://" in path


def open_ranges(path: str) -> LocalFile | RemoteFile:
    """For random access."""
    return RemoteFile(path) if is_remote(path) else LocalFile(path)


def open_stream(path: str) -> BinaryIO:
    """For reading on, with jumps ahead."""
    if not is_remote(path):
        return open(path, "rb")
    with plain_errors(path):
        system, inside = fsspec.core.url_to_fs(path)
        return system.open(inside, "rb")


def stamp(path: str) -> tuple[int, str]:
    """Size in bytes, and what changes when the file is written again. OSError where there is no file."""
    if not is_remote(path):
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise OSError("not a file")
        return about.st_size, str(about.st_mtime_ns)
    with plain_errors(path):
        system, inside = fsspec.core.url_to_fs(path)
        about = system.info(inside)
    version = next((about[key] for key in ("generation", "etag", "updated", "mtime", "created") if key in about), "")
    return int(about["size"]), str(version)


def why(error: Exception) -> str:
    """An error in one line; the operating system's without their number."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]
