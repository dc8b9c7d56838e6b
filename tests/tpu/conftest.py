import os

# Read by libtpu when it loads: no machine to ask about its topology, and a lock file of a killed run must not matter.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import pytest


@pytest.fixture(scope="session")
def tpu():
    """`tpu(name)`: the devices of a TPU topology, for compiling ahead of time; skips where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: the TPU compiler is not here")
    from jax.experimental import topologies

    def devices(name: str = "v5e:2x2"):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices

    return devices
