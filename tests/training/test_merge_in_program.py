"""A merge as part of a larger program: inside a training step's jit with the experts spread over 8 (simulated) devices,
and under pmap, it gives what a merge on one device gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import QUICK, environment

HERE = str(Path(__file__).parent)
METHODS = ["pivot", "ties", "iso_c"]

SCRIPT = f"""
import json
import jax, numpy as np
from tiny_backbone import build
from pivotjax.merging import Stacked, merge
from pivotjax.training.parallel import MeshConfig, make_mesh, shardings

tiny, names = build(), list("abcdefgh")
step, mesh = tiny.step(), make_mesh(MeshConfig(8, 1), 8, 4)
state, batch = tiny.state(8), tiny.batch(0, experts=8)
for seed in range(3):  # so that the experts differ
    state, _ = step(state, tiny.frozen, tiny.batch(seed, experts=8))
host = jax.device_get(state)


def train_and_merge(method):
    def program(state, frozen, batch, w0):
        state, _ = step(state, frozen, batch)
        merged = merge(w0, Stacked(state.params, names), method)
        return state, merged.params, merged.report["layers"]

    put = lambda root, tree: jax.device_put(tree, shardings(mesh, root, tree))
    arguments = put("state", host), put("frozen", tiny.frozen), put("batch", batch), put("w0", tiny.w0)
    return jax.jit(program)(*arguments)


def mapped(method, stacked):
    def one(own, w0):
        everyone = jax.lax.all_gather(own, "expert")
        return merge(w0, Stacked(everyone, names), method, diagnose="nothing").params

    return jax.pmap(one, axis_name="expert", in_axes=(0, None))(stacked, tiny.w0)


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(jax.device_get(tree))]).tolist()


found = {{}}
for method in {METHODS}:
    state, merged, layers = train_and_merge(method)
    experts = jax.device_get(state.params)
    alone = merge(jax.device_get(tiny.w0), Stacked(experts, names), method)
    each = jax.device_get(mapped(method, experts))
    found[method] = {{
        "devices": len(state.params["linear_0"]["kernel"].sharding.device_set),
        "norms": [float(v) for v in layers["linear_0"]["update_norms"].values()],
        "alone norms": list(alone.report["layers"]["linear_0"]["update_norms"].values()),
        "jit": flat(merged), "alone": flat(alone.params), "w0": flat(tiny.w0),
        "pmap": [flat(jax.tree.map(lambda a: a[i], each)) for i in (0, 7)],
    }}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    env = environment(HERE, XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count=8")
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_merge_inside_sharded_programs(found, method):
    runs = found[method]
    assert runs["devices"] == 8
    moved = np.abs(np.subtract(runs["alone"], runs["w0"])).max()
    assert moved > 1e-3
    for run in (runs["jit"], *runs["pmap"]):
        np.testing.assert_allclose(run, runs["alone"], rtol=0, atol=2e-4 * moved)
    np.testing.assert_allclose(runs["norms"], runs["alone norms"], rtol=1e-5)
