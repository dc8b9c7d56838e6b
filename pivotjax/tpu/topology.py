"""TPU slices that are not here: a topology's devices, for compiling ahead of time with libtpu's compiler."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import tyro

from pivotjax import config as configs
from pivotjax.errors import InputError

# What libtpu reads when it loads: there is no machine to ask about its topology, and the lock file of a killed run must
# not matter. The names of type and workers only silence its complaints that there are none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def devices(topology: str, host: tuple[int, ...], cores: str = "default") -> list[jax.Device]:
    """The devices of a slice, one a chip.

    Args:
        topology: libtpu's name, `v5e:16x16`, `v4:2x2x4`.
        host: chips of one host along each dimension.
        cores: `megacore` where both TensorCores of a chip are one device (v4, v5p).

    Raises:
        InputError: libtpu is not installed, or does not know the topology.
    """
    return list(_devices(topology, host, cores))


@cache
def _devices(topology: str, host: tuple[int, ...], cores: str) -> tuple[jax.Device, ...]:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError(
            "the TPU compiler is not installed; pip install 'pivotjax[tpu]' (libtpu; it compiles without a TPU)"
        ) from None
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with _quiet():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, chip_config_name=cores, chips_per_host_bounds=list(host)
            )
    except Exception as error:  # JaxRuntimeError, NotImplementedError, ... by version of libtpu
        line = str(error).splitlines()[0]
        raise InputError(f"libtpu does not know the topology {topology!r} ({line}); see tpu_configs/") from error
    return tuple(found.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libtpu's C++ writes on stderr while it loads is dropped; if it dies there, it is shown."""
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(stderr, 2)
            said.seek(0)
            os.write(2, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@dataclass(frozen=True)
class Slice:
    """A TPU slice: facts that no recipe changes. One YAML file each in tpu_configs/."""

    accelerator_type: str
    """What gcloud calls it; v4 and v5p count TensorCores (two a chip), v5e and v6e chips."""
    topology: str
    """libtpu's name of the generation and the chips along each dimension."""
    chips: int
    """Chips, each one JAX device."""
    hosts: int
    """Virtual machines, each one process."""
    host_chips: tuple[int, ...]
    """Chips of one host along each of three dimensions."""
    cores: Literal["default", "megacore"]
    """`megacore`: a chip's two TensorCores are one device."""
    wraps: tuple[bool, ...]
    """Whether the links of each dimension close to a ring."""
    hbm_gib: float
    """Memory of a chip, GiB."""
    peak_tflops: float
    """Peak bfloat16 TFLOP/s of a chip."""
    hbm_gbps: float
    """Bandwidth of a chip's memory, GB/s."""
    ici_gbps: float
    """What a chip can send to its neighbours at once over all links, GB/s (one direction)."""
    source: str
    """Where these numbers are from."""
    runtime: str
    """Software of its virtual machines."""
    gke_accelerator: str
    """Node label of Google Kubernetes Engine; its topology label is that of `topology`."""
    xla_flags: dict[str, bool]
    """Flags of libtpu's compiler that training on it wants; the launch scripts set them too (LIBTPU_INIT_ARGS)."""
    launch: tuple[str, ...]
    """Scripts of tpu_configs/launch/ that start a run on it."""

    @property
    def hbm_bytes(self) -> float:
        """Memory of a chip."""
        return self.hbm_gib * 2**30

    @property
    def peak_flops(self) -> float:
        """Of a chip, a second."""
        return self.peak_tflops * 1e12

    def devices(self) -> list[jax.Device]:
        """Its devices, for compiling ahead of time."""
        found = devices(self.topology, self.host_chips, self.cores)
        if len(found) != self.chips:
            raise InputError(f"{self.topology} has {len(found)} chips, not {self.chips}; correct the slice's file")
        return found


def load(path: Path) -> Slice:
    """A slice from its file; InputError where a key is missing, unknown or wrong."""
    found = configs.from_dict(Slice, configs.read_yaml(path), str(path))
    missing = [f.name for f in fields(found) if getattr(found, f.name) is tyro.MISSING]
    if missing:
        raise InputError(f"{path} has no `{missing[0]}`; copy a file of tpu_configs/ and change it")
    return found
