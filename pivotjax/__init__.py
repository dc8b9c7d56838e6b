"""pivotjax: pre-train multimodal projectors in JAX, merge them with PivotMerge, measure the gain, go to PyTorch."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pivotjax")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = ["InputError", "Merge", "__version__", "merge"]

from pivotjax.errors import InputError


def __getattr__(name: str):
    """Imports the merging room on first use, so that `pivotjax --help` does not wait for JAX."""
    if name in ("merge", "Merge"):
        import pivotjax.merging

        return getattr(pivotjax.merging, name)
    raise AttributeError(f"module 'pivotjax' has no attribute {name!r}")
