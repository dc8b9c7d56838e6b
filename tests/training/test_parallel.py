"""Four devices (simulated, in a process of their own) compute what one does, however experts and batch are spread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pivotjax.errors import InputError
from pivotjax.training.parallel import MeshConfig, make_mesh

ROOT = Path(__file__).parents[2]
MESHES = ["1x1", "1x4", "2x2", "4x1"]
EXPERTS, BATCH, STEPS = 4, 4, 6

SCRIPT = f"""
import json, sys
from pathlib import Path
import grain, jax, numpy as np
from tiny_backbone import build
from pivotjax.training.loop import CheckpointConfig, read_metrics, train
from pivotjax.training.parallel import MeshConfig, make_mesh

out = Path(sys.argv[1])
tiny = build(steps={STEPS}, log_every=1)

def go(mesh, folder, stop=None):
    given = []
    def make(seed):
        given.append(seed)
        if stop is not None and len(given) > stop:
            raise KeyboardInterrupt
        return tiny.batch(int(seed), experts={EXPERTS}, size={BATCH})
    data = grain.MapDataset.range(100).map(make)
    batches = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    expert, data_axis = map(int, mesh.split("x"))
    mesh = make_mesh(MeshConfig(expert, data_axis), {EXPERTS}, {BATCH})
    try:
        state = train(tiny.step(), tiny.state({EXPERTS}), tiny.frozen, batches, mesh=mesh, names=list("abcd"),
                      config=tiny.training, checkpoints=CheckpointConfig(every_steps=2), folder=folder)
    except KeyboardInterrupt:
        return None
    leaf = state.params["linear_0"]["kernel"]
    rows = read_metrics(folder)
    return {{
        "losses": [[row[name]["loss"] for name in "abcd"] for row in rows],
        "params": np.concatenate([np.ravel(a) for a in jax.tree.leaves(jax.device_get(state.params))]).tolist(),
        "shard": leaf.sharding.shard_shape(leaf.shape)[0],
        "devices": len(leaf.sharding.device_set),
    }}

found = {{mesh: go(mesh, out / mesh) for mesh in {MESHES}}}
go("2x2", out / "moved", stop=3)
found["moved"] = go("4x1", out / "moved")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("runs"))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "going on from step 2" in ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES[1:], "moved"])
def test_any_mesh_trains_as_one_device_does(runs, mesh):
    """`moved`: stopped on one mesh and resumed on another."""
    one, spread = runs["1x1"], runs[mesh]
    assert np.shape(one["losses"]) == (STEPS, EXPERTS)
    np.testing.assert_allclose(spread["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spread["params"], one["params"], rtol=0, atol=1e-4)
    assert np.ptp(one["losses"], axis=0).min() > 1e-3  # and something was learned that could differ


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "experts_a_device"), [("1x1", 4), ("1x4", 4), ("2x2", 2), ("4x1", 1)])
def test_experts_are_where_the_mesh_says(runs, mesh, experts_a_device):
    assert runs[mesh]["shard"] == experts_a_device
    assert runs[mesh]["devices"] == (1 if mesh == "1x1" else 4)


@pytest.mark.parametrize(("config", "said"), [(MeshConfig(2, 1), "needs 2 devices"), (MeshConfig(1, 3), "needs 3")])
def test_a_mesh_that_does_not_fit_the_devices(config, said):
    with pytest.raises(InputError, match=said):
        make_mesh(config, 2, 2)
