"""`pivotjax inspect CHECKPOINT`: what a projector is, and whether it is whole and finite."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from pivotjax import config as configs
from pivotjax.jobs import assemble
from pivotjax.models import projector


@dataclass(frozen=True)
class InspectConfig:
    """Says what a projector checkpoint is: an Orbax folder or a .safetensors file."""

    checkpoint: tyro.conf.Positional[Path]
    """Orbax folder or .safetensors file."""
    json: bool = False
    """Print JSON."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    config = configs.overridden(InspectConfig(tyro.MISSING), args, "pivotjax inspect")
    found = describe(config.checkpoint)
    print(json.dumps(found, indent=1) if config.json else configs.to_yaml(found).rstrip())


def describe(path: Path) -> dict[str, Any]:
    """Shapes, dtypes, size, finiteness, fingerprint and provenance of a projector."""
    params, info = assemble.load_projector(path)
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(a)
        for p, a in jax.tree_util.tree_leaves_with_path(params)
    }
    return {
        "path": str(path),
        "name": info.get("name"),
        "parameters": sum(a.size for a in leaves.values()),
        "tensors": {name: f"{a.dtype}[{', '.join(map(str, a.shape))}]" for name, a in leaves.items()},
        "finite": all(bool(np.isfinite(a).all()) for a in leaves.values()),
        "fingerprint": projector.fingerprint(params),
    } | {key: value for key, value in info.items() if key not in ("name", "fingerprint")}
