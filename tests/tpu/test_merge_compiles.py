"""The merge methods through the real TPU compiler, ahead of time, for the projector of LLaVA-1.5-7B on one v5e chip.

Compile time is processor time of this process (libtpu compiles in it), so that a busy machine does not fail the test;
the limits are 60 s for PivotMerge and 180 s for any other method on two cores, hence twice that in processor time.
Nothing is run: no TPU is here. The table of times is in docs/merging.md.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pivotjax.merging import METHODS, merge

# Everything that decomposes; what works entry by entry compiles in seconds, `ties` and `karcher` stand for it.
SPECTRAL = [name for name, m in sorted(METHODS.items()) if m.scope == "layer" and "calibration" not in m.needs]
CASES = [("pivot", {}), ("pivot", {"gram": "none", "basis": "energy"})]
CASES += [(name, {}) for name in [*SPECTRAL, "ties", "karcher"]]


def shapes(devices):
    where = NamedSharding(Mesh(np.array(devices[:1]), ("all",)), PartitionSpec())

    def one(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    return {"linear_0": {"kernel": one(1024, 4096), "bias": one(4096)},
            "linear_1": {"kernel": one(4096, 4096), "bias": one(4096)}}  # fmt: skip


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("method, options", CASES)
def test_merge_compiles_for_v5e(tpu, method, options):
    tree, count = shapes(tpu("v5e:2x2")), 2 if method == "slerp" else 4
    experts = dict.fromkeys("abcd"[:count], tree)
    program = jax.jit(lambda base, experts: merge(base, experts, method, diagnose="nothing", **options).params)
    started = time.process_time()
    compiled = program.lower(tree, experts).compile()
    seconds = time.process_time() - started
    memory = compiled.memory_analysis()
    print(f"{method} {options}: {seconds:.0f} s, code {memory.generated_code_size_in_bytes / 1e6:.1f} MB, "
          f"temporary {memory.temp_size_in_bytes / 1e9:.2f} GB")  # fmt: skip
    assert seconds < 2 * (60 if method == "pivot" else 180)
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 16e9  # a v5e chip's memory
