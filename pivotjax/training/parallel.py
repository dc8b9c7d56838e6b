"""Where arrays live: a mesh with axes `expert` and `data`, and one table from array names to PartitionSpecs."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pivotjax.config import check_least
from pivotjax.errors import InputError

# First match wins; names are the pytree's path, joined by "/".
RULES: tuple[tuple[str, P], ...] = (
    (r"batch/.*", P("expert", "data")),
    (r"state/(params|opt_state)/.*", P("expert")),
    (r"state/alive", P("expert")),
    (r"metrics/.*", P("expert")),
    (r".*", P()),  # the step counter and the frozen weights: one copy a device
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product must be the number of devices (1 x 1: the first device)."""

    expert: int = 1
    """Devices over which the experts are spread."""
    data: int = 1
    """Devices over which each expert's batch is spread."""

    def __post_init__(self):
        check_least(self, expert=1, data=1)


def make_mesh(config: MeshConfig, experts: int, batch: int) -> Mesh:
    """The mesh; InputError where it does not fit the devices, the experts or the batch."""
    need = config.expert * config.data
    devices = jax.devices()
    if need > len(devices) or (need != 1 and need != len(devices)):
        raise InputError(
            f"mesh {config.expert} x {config.data} needs {need} devices, {len(devices)} are there; "
            "set mesh.expert and mesh.data"
        )
    for name, size, axis in (("experts", experts, config.expert), ("samples of an expert", batch, config.data)):
        if size % axis:
            raise InputError(f"{size} {name} cannot be spread evenly over {axis} devices; change the mesh or the batch")
    return jax.make_mesh(
        (config.expert, config.data), ("expert", "data"), devices=devices[:need], axis_types=(AxisType.Auto,) * 2
    )


def shardings(mesh: Mesh, root: str, tree: Any) -> Any:
    """A NamedSharding for every leaf of `tree`, whose names start with `root`."""

    def of(path, leaf):
        name = "/".join([root, *(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)])
        spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
        return NamedSharding(mesh, P(*spec[: np.ndim(leaf)]))

    return jax.tree_util.tree_map_with_path(of, tree)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch -> global arrays on the mesh."""
    return jax.tree.map(jax.make_array_from_process_local_data, shardings(mesh, "batch", batch), batch)
