"""Projectors on disk: bit for bit, whole or not at all, and readable by PyTorch as they are."""

import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pivotjax.checkpoints import store, torch_bridge
from pivotjax.errors import InputError
from pivotjax.models import projector

KINDS = ("linear", "mlp2x_gelu", "mlp3x_gelu")
INFO = {"name": "expert:emoji", "init_id": "abc", "domains": ["emoji"], "config": {"data": {"prompt": "\n", "x": None}}}


def random(kind, seed=0, d_in=5, d_out=7):
    """Weights of every kind of float: tiny, huge, negative zero."""
    params = projector.init(kind, d_in, d_out, jax.random.key(seed), 1.0)
    params = jax.tree.map(lambda a: a + jax.random.normal(jax.random.key(seed), a.shape), params)
    odd = jnp.array([-0.0, 1e-38, 3e38])
    params["linear_0"]["bias"] = params["linear_0"]["bias"].at[:3].set(odd)
    return params


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def assert_same_bytes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_gives_back_every_bit_and_the_info(tmp_path, kind, dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), random(kind))
    store.save_projector(tmp_path / "p", params, INFO)
    loaded = store.load_projector(tmp_path / "p")
    assert_same_bytes(loaded.params, params)
    assert loaded.info == {"format": 1, "fingerprint": projector.fingerprint(params)} | INFO
    assert store.projector_info(tmp_path / "p") == loaded.info
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.save_projector(Path("runs/p"), random("linear"), INFO)
    assert_same_bytes(store.load_projector(Path("runs/p")).params, random("linear"))
    torch_bridge.save_torch(Path("p.safetensors"), random("linear"), INFO)
    assert_same_bytes(torch_bridge.load_torch(Path("p.safetensors"))[0], random("linear"))


@pytest.mark.parametrize("kind", [*KINDS, "mlp1x_gelu"])
def test_safetensors_gives_back_every_bit_and_the_info(tmp_path, kind):
    torch_bridge.save_torch(tmp_path / "p.safetensors", random(kind), INFO)
    params, info = torch_bridge.load_torch(tmp_path / "p.safetensors")
    assert_same_bytes(params, random(kind))
    assert info == INFO
    assert (tmp_path / "p.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def test_both_files_tell_of_the_same_projector(tmp_path):
    store.save_projector(tmp_path / "p", random("mlp2x_gelu"), INFO)
    torch_bridge.save_torch(tmp_path / "p.safetensors", random("mlp2x_gelu"), INFO)
    params, _ = torch_bridge.load_torch(tmp_path / "p.safetensors")
    assert projector.fingerprint(params) == store.load_projector(tmp_path / "p").info["fingerprint"]


def test_llava_layout_in_torch(tmp_path):
    """`mm_projector` of LLaVA: nn.Sequential(Linear, GELU, Linear); the same outputs at 1e-5."""
    params = projector.init("mlp2x_gelu", 24, 16, jax.random.key(0), 1.0)
    torch_bridge.save_torch(tmp_path / "p.safetensors", params, {})
    tensors = load_file(tmp_path / "p.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.mm_projector.0.weight": (16, 24),
        "model.mm_projector.0.bias": (16,),
        "model.mm_projector.2.weight": (16, 16),
        "model.mm_projector.2.bias": (16,),
    }
    network = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    network.load_state_dict({name.removeprefix("model.mm_projector."): tensor for name, tensor in tensors.items()})
    features = np.random.default_rng(0).normal(size=(3, 4, 24)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(projector.apply(params, features), expected, rtol=1e-5, atol=1e-5)


def test_llava_linear_in_torch(tmp_path):
    params = random("linear")
    torch_bridge.save_torch(tmp_path / "p.safetensors", params, {})
    tensors = load_file(tmp_path / "p.safetensors")
    assert set(tensors) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    np.testing.assert_array_equal(
        tensors["model.mm_projector.weight"].numpy(), np.asarray(params["linear_0"]["kernel"]).T
    )


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_projectors_of_other_programs_are_read(tmp_path, prefix):
    from safetensors.torch import save_file

    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.GELU(), torch.nn.Linear(4, 4)).to(torch.bfloat16)
    save_file({prefix + name: tensor for name, tensor in network.state_dict().items()}, tmp_path / "p.safetensors")
    params, info = torch_bridge.load_torch(tmp_path / "p.safetensors")
    assert info == {} and {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    expected = network.state_dict()["2.weight"].float().numpy().T
    np.testing.assert_array_equal(params["linear_1"]["kernel"].astype(np.float32), expected)


@pytest.mark.parametrize(
    "broken", [{"1.weight": (2, 2), "1.bias": (2,)}, {"0.weight": (2, 2)}, {"2.weight": (2, 2)}, {}]
)
def test_what_is_no_whole_projector_is_refused(broken):
    with pytest.raises(InputError, match="here"):
        torch_bridge.from_torch({name: np.zeros(shape, np.float32) for name, shape in broken.items()}, "here")


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_failed_save_leaves_the_old_one(tmp_path, kind):
    path = tmp_path / ("p" if kind == "orbax" else "p.safetensors")
    save = store.save_projector if kind == "orbax" else torch_bridge.save_torch
    load = store.load_projector if kind == "orbax" else torch_bridge.load_torch
    save(path, random("mlp2x_gelu", 1), INFO)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(InputError, match=f"cannot write {path}: .*free some space") as caught:
            save(path, random("mlp2x_gelu", 2, 64, 64), INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert_same_bytes(load(path)[0], random("mlp2x_gelu", 1))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    save(path, random("mlp2x_gelu", 3), {})
    assert_same_bytes(load(path)[0], random("mlp2x_gelu", 3))


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    store.save_projector(tmp_path / "p", random("linear", 1), INFO)
    monkeypatch.setattr(store.ocp, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save_projector(tmp_path / "p", random("linear", 2), INFO)
    assert_same_bytes(store.load_projector(tmp_path / "p").params, random("linear", 1))
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "p").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        store.save_projector(tmp_path / "p", random("linear"), INFO)
    assert (tmp_path / "p").read_text() == "in the way"
