"""pivotjax: pre-train multimodal projectors in JAX, merge them with PivotMerge, measure the gain, go to PyTorch."""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pivotjax")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = ["InputError", "Merge", "Model", "__version__", "load_model", "merge"]

from pivotjax.errors import InputError


def __getattr__(name: str):
    """Imports a room on first use, so that `pivotjax --help` does not wait for JAX."""
    room = {"merge": "merging", "Merge": "merging", "load_model": "models.multimodal", "Model": "models.multimodal"}
    if name in room:
        return getattr(importlib.import_module(f"pivotjax.{room[name]}"), name)
    raise AttributeError(f"module 'pivotjax' has no attribute {name!r}")
