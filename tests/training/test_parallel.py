"""Eight devices (simulated, in a process of their own) compute what one does, however experts, batch and weights are
spread and however the step saves memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivotjax.errors import InputError
from pivotjax.training.parallel import MeshConfig, _share, layout, make_mesh

ROOT = Path(__file__).parents[2]
EXPERTS, ROWS, STEPS = 4, 8, 4
CASES = {
    "one device": ((1, 1, 1, 1), {}),
    "data": ((1, 8, 1, 1), {"loss_chunk": 2}),
    "data, experts": ((2, 2, 2, 1), {"device_batch": 2}),
    "experts, tensor": ((4, 1, 1, 2), {"remat": "dots"}),
    "everything": ((1, 2, 2, 2), {"remat": "layers", "accumulate": 2}),
    "fsdp": ((1, 1, 8, 1), {"remat": "layers"}),
    "pmap": ((1, 4, 1, 1), {"loss_chunk": 3, "accumulate": 2}),
    "bfloat16": ((2, 1, 2, 2), {"remat": "dots", "loss_chunk": 2}),
    "one device, packed": ((1, 1, 1, 1), {}),
    "everything, packed": ((2, 1, 2, 2), {"remat": "layers", "accumulate": 2}),
}
EVALUATED = ["one device", "everything", "pmap"]

# Compiled without the optimisations that take longest: these are tiny programs.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true"

SCRIPT = f"""
import json
import jax, numpy as np
import jax.numpy as jnp
from tiny_backbone import build
from pivotjax.training.attention import splash
from pivotjax.training.parallel import MeshConfig, layout, make_mesh
from pivotjax.training.step import make_evaluation

def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(jax.device_get(tree))]).tolist()

def go(name, sizes, options):
    tiny = build(jnp.dtype("bfloat16" if name == "bfloat16" else "float32"), steps=20, **options)
    tiny = tiny._replace(w0=build().w0)
    devices = jax.devices()[:int(np.prod(sizes))]
    where = layout("pmap" if "pmap" in name else "jit", make_mesh(MeshConfig(*sizes), {EXPERTS}, {ROWS}, devices))
    step = where.compile(tiny.step(where))
    state, frozen = where.put_state(tiny.state({EXPERTS})), where.put_frozen(tiny.frozen)
    make = tiny.packed if "packed" in name else tiny.batch
    losses = []
    for seed in range({STEPS}):
        batch = make(seed, experts={EXPERTS}, size={ROWS})
        if seed == 2:
            batch["weights"][1, :3] = 0  # an expert with fewer tokens than the others
        state, metrics = step(state, frozen, where.put_batch(batch))
        losses.append(np.asarray(metrics.loss).tolist())
    evaluate = where.compile_evaluation(make_evaluation(tiny.network, tiny.training, where))
    sums = evaluate(state.params, frozen, where.put_batch(batch)) if name in {EVALUATED} else ()
    leaf, weight = state.params["linear_0"]["kernel"], frozen["language"]["layers"]["q"]["kernel"]
    return {{
        "losses": losses, "params": flat(state.params), "tokens": np.asarray(metrics.tokens).tolist(),
        "evaluation": [np.asarray(a).tolist() for a in sums],
        "experts": leaf.sharding.shard_shape(leaf.shape)[0], "devices": len(leaf.sharding.device_set),
        "weights": weight.size // np.prod(weight.sharding.shard_shape(weight.shape)),
        "programs": step._cache_size() if where.parallel == "jit" else 1,
    }}

def splash_apart():  # how far the kernel on a mesh is from the kernel on one device, experts mapped over both
    mesh = make_mesh(MeshConfig(2, 1, 2, 2), 2, 2)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 2, 12)), axis=-1), jnp.int32)

    def attend(mesh):
        one = lambda q, k, v, segments: splash(mesh, segments, interpret=True)(q, k, v)
        mapped = jax.vmap(one, spmd_axis_name="expert" if mesh else None)
        return jax.jit(lambda q: jax.value_and_grad(lambda q: jnp.sum(mapped(q, k, v, segments) ** 2))(q))(q)

    (value, slope), (expected, expected_slope) = attend(mesh), attend(None)
    assert abs(expected) > 1
    return max(float(abs(value / expected - 1)), float(jnp.abs(slope - expected_slope).max()))

found = {{name: go(name, *case) for name, case in {CASES}.items()}}
print(json.dumps(found | {{"splash": splash_apart()}}, default=float))
"""


@pytest.fixture(scope="module")
def runs():
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("one device")])
def test_any_split_trains_as_one_device_does(runs, case):
    one, spread = runs["one device, packed" if "packed" in case else "one device"], runs[case]
    assert np.shape(one["losses"]) == (STEPS, EXPERTS)
    tolerance = 3e-2 if case == "bfloat16" else 1e-5
    np.testing.assert_allclose(spread["losses"], one["losses"], rtol=tolerance, atol=tolerance)
    if case != "bfloat16":
        np.testing.assert_allclose(spread["params"], one["params"], rtol=0, atol=1e-4)
    if case in EVALUATED:
        np.testing.assert_allclose(spread["evaluation"], one["evaluation"], rtol=1e-5)
    assert spread["tokens"] == one["tokens"]
    assert np.ptp(one["losses"], axis=0).min() > 1e-3  # and something was learned that could differ


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_arrays_are_where_the_mesh_says(runs, case):
    (expert, data, fsdp, tensor), _ = CASES[case]
    assert runs[case]["experts"] == EXPERTS // expert
    assert runs[case]["devices"] == expert * data * fsdp * tensor
    assert runs[case]["weights"] == fsdp * tensor
    assert runs[case]["programs"] == 1


@pytest.mark.slow
def test_splash_on_a_mesh_is_splash(runs):
    assert runs["splash"] < 1e-4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((2, 1, 1, 1), "needs 2 devices"),
        ((1, 3, 1, 1), "needs 3"),
        ((0, 0, 1, 1), "one may be 0, not 2"),
        ((1, 1, 1, -1), "tensor must be at least 0"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(sizes, said):
    with pytest.raises(InputError, match=said):
        make_mesh(MeshConfig(*sizes), 2, 2)


class Chip:
    platform = device_kind = "cpu"

    def __init__(self, process_index=0):
        self.process_index = process_index


def test_a_mesh_of_which_nothing_is_said_takes_all_devices_in_their_order():
    chips = [Chip() for _ in range(8)]
    for given, shape in ((MeshConfig(), (1, 8, 1, 1)), (MeshConfig(expert=2, fsdp=2), (2, 2, 2, 1))):
        mesh = make_mesh(given, 2, 8, chips)
        assert tuple(mesh.shape.values()) == shape and list(mesh.devices.flat) == chips
    with pytest.raises(InputError, match=r"6 samples .* over 8 devices \(mesh 1 x 8 x 1 x 1"):
        make_mesh(MeshConfig(), 2, 6, chips)


def test_devices_that_a_mesh_leaves_idle(capsys):
    one = MeshConfig(1, 1, 1, 1)
    assert make_mesh(one, 2, 8, [Chip() for _ in range(4)]).size == 1
    assert "1 of 4 devices is used; mesh.data: 0 takes all" in capsys.readouterr().err
    with pytest.raises(InputError, match="leaves processes without a device; set mesh"):
        make_mesh(one, 2, 8, [Chip(0), Chip(1)])


def test_frozen_weights_that_are_in_place_are_not_copied():
    weights = {"language": {"embedding": jnp.ones((64, 64)), "layers": {"q": {"kernel": jnp.ones((2, 64, 64))}}}}
    placed = layout("jit", make_mesh(MeshConfig(), 1, 1)).put_frozen(weights)
    for old, new in zip(jax.tree.leaves(weights), jax.tree.leaves(placed)):
        assert old.unsafe_buffer_pointer() == new.unsafe_buffer_pointer()


def test_pmap_is_for_data_alone():
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), ("expert", "data", "fsdp", "tensor"))
    with pytest.raises(InputError, match="for the mesh 2 x 1 x 1 x 1 on 1 hosts set parallel: jit"):
        layout("pmap", mesh)


SHARES = {
    "rows side by side": ({0: {(0, 0), (0, 2)}, 1: {(0, 4), (0, 6)}}, [((0, 4), (0, 4)), ((0, 4), (4, 8))]),
    "rows apart": ({0: {(0, 0), (0, 4)}, 1: {(0, 2), (0, 6)}}, [((0, 4), (0, 4)), ((0, 4), (4, 8))]),
    "experts apart": ({0: {(0, 0)}, 1: {(4, 0)}}, [((0, 4), (0, 2)), ((4, 8), (0, 2))]),
    "the same rows": ({0: {(0, 0)}, 1: {(0, 0)}}, [((0, 4), (0, 2))] * 2),
    "rows in part the same": ({0: {(0, 0), (0, 2)}, 1: {(0, 2), (0, 4)}}, None),
    "no block": ({0: {(0, 0), (4, 2)}, 1: {(0, 2), (4, 0)}}, None),
}


@pytest.mark.parametrize("case", SHARES)
def test_what_each_process_feeds(case):
    """Parts of 4 experts and 2 rows, by process; together the processes feed every row of every expert they hold."""
    held, expected = SHARES[case]
    if expected is None:
        with pytest.raises(InputError, match="overlap in part"):
            _share(held, 0, (4, 2))
    else:
        shares = [_share(held, process, (4, 2)) for process in held]
        assert [((e.start, e.stop), (r.start, r.stop)) for e, r in shares] == expected
