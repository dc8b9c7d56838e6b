"""Tensors on disk: what is read and written one by one is what the safetensors package writes and reads."""

import hashlib
import json
import zlib

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pivotjax.checkpoints import tensors
from pivotjax.checkpoints.tensors import Spec
from pivotjax.errors import InputError


def model(seed=0):
    """Tensors of several dtypes and ranks, an empty one and a scalar among them."""
    rng = np.random.default_rng(seed)
    return {
        "layers.0.weight": rng.normal(size=(7, 5)).astype(np.float32),
        "layers.0.bias": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "layers.1.weight": rng.normal(size=(3, 2, 2)).astype(np.float16),
        "ids": np.arange(6, dtype=np.int64),
        "mask": np.array([True, False, True]),
        "scale": np.array(rng.normal()),
        "nothing": np.zeros((0, 4), np.float32),
    }


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def specs_of(held):
    return {name: Spec(tensor.dtype, tensor.shape) for name, tensor in held.items()}


@pytest.fixture
def folder(tmp_path):
    """A model in two shards with their index."""
    held, where = model(), {}
    for i, names in enumerate((list(held)[:3], list(held)[3:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: held[name] for name in names}, tmp_path / file)
        where |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


def test_reading_a_file(tmp_path):
    save_file(model(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    with tensors.open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.specs == specs_of(model())
        for name, expected in model().items():
            read = checkpoint.read(name)
            assert same(read, expected) and (read.ctypes.data % 64 == 0 or not read.size)


def test_reading_shards(folder):
    with tensors.open_checkpoint(folder) as checkpoint:
        assert all(same(checkpoint.read(name), expected) for name, expected in model().items())
        assert [set(names) for names in checkpoint.files.values()] == [set(list(model())[:3]), set(list(model())[3:])]


def test_reading_a_torch_file(tmp_path):
    held = {"0.weight": torch.randn(3, 2).to(torch.bfloat16), "0.bias": torch.arange(3.0)}
    torch.save(held, tmp_path / "mm_projector.bin")
    with tensors.open_checkpoint(tmp_path / "mm_projector.bin") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("0.weight").astype(np.float32), held["0.weight"].float().numpy())
        assert checkpoint.specs["0.bias"] == Spec(np.dtype(np.float32), (3,))
        digest = hashlib.sha256((tmp_path / "mm_projector.bin").read_bytes()).hexdigest()
        assert checkpoint.digests() == {"mm_projector.bin": digest}


@pytest.mark.parametrize("order", ["as the bytes lie", "backwards", "none", "some"])
def test_hashes_are_those_of_the_files_in_whatever_order_they_are_read(folder, order):
    with tensors.open_checkpoint(folder) as checkpoint:
        names = sorted(checkpoint.specs, key=checkpoint.position)
        for name in {"as the bytes lie": names, "backwards": names[::-1], "none": [], "some": names[1::2]}[order]:
            checkpoint.read(name)
        found = checkpoint.digests()
    assert found == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_a_file_read_in_order_is_read_once(folder, monkeypatch):
    with tensors.open_checkpoint(folder) as checkpoint:
        for name in sorted(checkpoint.specs, key=checkpoint.position):
            checkpoint.read(name)
        monkeypatch.setattr(tensors.os, "preadv", None)
        checkpoint.digests()


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_written_is_read_by_the_safetensors_package(tmp_path, order):
    held = model()
    with tensors.ShardedWriter(tmp_path, tensors.sharded(specs_of(held), 10**9), {"format": "pt"}) as writer:
        for name in list(held)[::order]:
            writer.write(name, held[name])
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(held) and all(same(read[name], held[name]) for name in held)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("layers.0.weight").numpy(), held["layers.0.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_are_written_with_their_index(tmp_path):
    held = model()
    shards = tensors.sharded(specs_of(held), 150)
    assert next(iter(shards)) == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 1
    assert all(tensors.sizes(specs.values()) <= 150 for specs in shards.values())
    with tensors.ShardedWriter(tmp_path, shards, {}) as writer:
        for name in held:
            writer.write(name, held[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    for name, file in index["weight_map"].items():
        assert same(load_file(tmp_path / file)[name], held[name])
    with tensors.open_checkpoint(tmp_path) as checkpoint:
        assert all(same(checkpoint.read(name), held[name]) for name in held)


def test_a_tensor_that_was_announced_must_come_and_be_what_was_said(tmp_path):
    with pytest.raises(ValueError, match="announced and not written"):
        with tensors.ShardedWriter(tmp_path, tensors.sharded(specs_of(model()), 10**9), {}):
            pass
    with pytest.raises(ValueError, match="announced was"):
        with tensors.ShardedWriter(tmp_path, tensors.sharded(specs_of(model()), 10**9), {}) as writer:
            writer.write("ids", np.zeros(6, np.int32))


def with_header(path, change, held=None):
    """A safetensors file whose header (as JSON values, or as bytes) was changed."""
    save_file(held or {"a": np.arange(4, dtype=np.float32), "b": np.arange(2, dtype=np.float32)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def entry(name, **said):
    return lambda header: header | {name: header[name] | said}


@pytest.mark.parametrize("change, said", [
    (entry("a", data_offsets=[0, 24]), "cannot have 24 bytes"),
    (entry("a", shape=[6], data_offsets=[0, 24]), "overlap"),
    (entry("b", shape=[1], data_offsets=[20, 24]), "leave a gap"),
    (entry("b", shape=[3], data_offsets=[16, 28]), "its tensors take 28 bytes, the file holds 24"),
    (entry("b", shape=[1], data_offsets=[16, 20]), "its tensors take 20 bytes, the file holds 24"),
    (entry("a", shape=[2**40, 2**40]), "cannot have 16 bytes"),
    (entry("a", shape=[-4]), "no list of whole numbers"),
    (entry("a", shape=[True, 4]), "no list of whole numbers"),
    (entry("a", shape="4"), "no list of whole numbers"),
    (entry("a", data_offsets=[0]), "does not describe 'a'"),
    (entry("a", data_offsets=[16.0, 32]), "no list of whole numbers"),
    (entry("a", dtype="F4"), "unknown dtype 'F4'"),
    (lambda header: header | {"c": None}, "does not describe 'c'"),
    (lambda header: [header], "not a mapping"),
    (lambda header: json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:], "names 'a' twice"),
    (lambda header: b"{" * 100_000, "not a whole safetensors file"),
    (lambda header: b"\xff\xfe", "not a whole safetensors file"),
])  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, change, said):
    path = with_header(tmp_path / "m.safetensors", change)
    with pytest.raises(InputError) as error:
        tensors.open_checkpoint(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        tensors.open_checkpoint(path)


def test_whatever_bytes_are_changed_a_header_gives_the_tensors_or_one_clear_line(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.integers(0, 500)] = rng.integers(0, 256)
        path.write_bytes(bytes(changed))
        try:
            with tensors.open_checkpoint(path) as checkpoint:
                assert sum(checkpoint.read(name).nbytes for name in checkpoint.specs) <= len(whole)
        except InputError as error:
            assert "\n" not in str(error)


def test_an_index_that_lies_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    moved = next(iter(held["weight_map"]))
    for changed in (held["weight_map"] | {moved: held["weight_map"]["ids"]}, held["weight_map"] | {"other": "x"}):
        index.write_text(json.dumps(held | {"weight_map": changed}))
        with pytest.raises(InputError, match=r"which it does not|not there"):
            tensors.open_checkpoint(folder)


def test_two_shards_with_one_tensor_are_refused(folder):
    save_file(model(), folder / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="both hold"):
        tensors.open_checkpoint(folder)


def test_what_is_missing_is_named(tmp_path, folder):
    for path in (tmp_path / "none.safetensors", tmp_path / "none"):
        with pytest.raises(InputError, match=f"no checkpoint at {path}"):
            tensors.open_checkpoint(path)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="shards that are not there"):
        tensors.open_checkpoint(folder)


def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(InputError, match="refused: its pickle names"):
        tensors.open_checkpoint(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "torn.bin").write_bytes(zlib.compress(b"no pickle"))
    with pytest.raises(InputError, match="not a whole torch state dict"):
        tensors.open_checkpoint(tmp_path / "torn.bin")
