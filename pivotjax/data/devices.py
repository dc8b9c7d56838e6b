"""Work that all devices of this host share: a frozen model on each of them, a part of every batch for each."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")


def replicated(params: T) -> T:
    """A tree of weights on every device of this host; those that are there already stay."""
    return jax.device_put(params, _on_devices(PartitionSpec()))


def shared_out(batch: np.ndarray) -> jax.Array:
    """A batch, its first axis a multiple of `jax.local_device_count()`, over the devices of this host."""
    return jax.device_put(batch, _on_devices(PartitionSpec("data")))


def _on_devices(spec: PartitionSpec) -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, spec)
