"""Tiny projectors, in memory and on disk, and a recipe that merges them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from pivotjax.checkpoints import store
from pivotjax.models import projector


def tiny(seed: int = 0, kind: str = "mlp2x_gelu", d_in: int = 6, d_out: int = 4) -> projector.Params:
    return projector.init(kind, d_in, d_out, jax.random.key(seed), 1.0)


class Family(NamedTuple):
    """A W0 and two experts of it on disk, and a recipe that merges them."""

    folder: Path
    recipe: Path

    def write(self, name: str, params: projector.Params, **info: Any) -> Path:
        about = {"init_id": "one", "name": name, "domains": [name]} | info
        store.save_projector(self.folder / name, params, about)
        return self.folder / name
