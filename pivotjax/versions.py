"""The versions that numbers come from."""

import platform
from importlib import metadata

from pivotjax import __version__


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"pivotjax": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }
