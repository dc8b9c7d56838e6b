"""Torch's files tensor by tensor, and torch's files written without torch."""

import json
import os
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from pivotjax.checkpoints import pickles, tensors
from pivotjax.errors import InputError


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
    held = {f"of.{kind}": torch.randint(100, (3, 5)).to(getattr(torch, kind)) for kind in kinds}
    return held | {
        "of.bool": torch.tensor([True, False]),
        "whole": base, "transposed": base.T, "rows": base[2:4], "columns": base[:, 1::3],  # one storage
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip


def test_each_tensor_is_read_from_its_place(tmp_path):
    torch.save(state(), tmp_path / "pytorch_model.bin")
    with tensors.open_checkpoint(tmp_path / "pytorch_model.bin") as checkpoint:
        assert type(checkpoint) is tensors.Checkpoint and checkpoint.keys() == state().keys()
        for name, tensor in state().items():
            np.testing.assert_array_equal(checkpoint.read(name), as_numpy(tensor), strict=True)
            assert checkpoint.specs[name] == tensors.Spec(as_numpy(tensor).dtype, tuple(tensor.shape))


def test_reading_one_tensor_reads_its_bytes_alone(tmp_path, monkeypatch):
    torch.save({"large": torch.zeros(1 << 20), "small": torch.ones(3)}, tmp_path / "m.bin")
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, rooms, at: read.append(len(rooms[0])) or preadv(fd, rooms, at))
    with tensors.open_checkpoint(tmp_path / "m.bin") as checkpoint:
        assert checkpoint.read("small").tolist() == [1, 1, 1]
    assert read == [12]


def test_a_folder_of_shards(tmp_path):
    held = list(state().items())
    where = {}
    for i, part in enumerate((held[:5], held[5:]), 1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save(dict(part), tmp_path / file)
        where |= dict.fromkeys(dict(part), file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with tensors.open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint) == len(held) and len(checkpoint.files) == 2
        for name, tensor in held:
            np.testing.assert_array_equal(checkpoint[name], as_numpy(tensor), strict=True)


def test_the_older_layout_is_read_whole(tmp_path):
    torch.save(state(), tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    with tensors.open_checkpoint(tmp_path / "m.bin") as checkpoint:
        assert isinstance(checkpoint, tensors.Memory)
        for name, tensor in state().items():
            np.testing.assert_array_equal(checkpoint.read(name), as_numpy(tensor), strict=True)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written(tmp_path, weights_only, mmap):
    written = {name: as_numpy(tensor) for name, tensor in state().items()}
    pickles.write_state_dict(tmp_path / "mm_projector.bin", written)
    read = torch.load(tmp_path / "mm_projector.bin", weights_only=weights_only, mmap=mmap)
    assert list(read) == list(written)
    for name, tensor in read.items():
        np.testing.assert_array_equal(as_numpy(tensor), written[name], strict=True)
        assert tensor.data_ptr() % 64 == 0 or not mmap or not tensor.numel()


def test_written_files_are_read_here_and_are_always_the_same_bytes(tmp_path):
    written = {name: as_numpy(tensor) for name, tensor in state().items()}
    for file in ("a/m.bin", "b/m.bin"):
        pickles.write_state_dict(tmp_path / file, written)
    assert (tmp_path / "a/m.bin").read_bytes() == (tmp_path / "b/m.bin").read_bytes()
    with tensors.open_checkpoint(tmp_path / "a/m.bin") as checkpoint:
        for name, tensor in written.items():
            np.testing.assert_array_equal(checkpoint.read(name), tensor, strict=True)
    assert pickles.read_state_dict(tmp_path / "a/m.bin").keys() == written.keys()


def test_a_dtype_that_torch_storages_lack(tmp_path):
    with pytest.raises(ValueError, match="x is float8_e4m3fn"):
        pickles.write_state_dict(tmp_path / "m.bin", {"x": np.zeros(2, ml_dtypes.float8_e4m3fn)})
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_found(tmp_path):
    torch.save({"a": torch.arange(64.0)}, tmp_path / "m.bin")
    data = bytearray((tmp_path / "m.bin").read_bytes())
    at = data.index(np.arange(64, dtype=np.float32).tobytes())
    data[at + 9] ^= 1
    (tmp_path / "m.bin").write_bytes(data)
    with tensors.open_checkpoint(tmp_path / "m.bin") as checkpoint, pytest.raises(InputError, match="'a' are damaged"):
        checkpoint.read("a")


def members(path, change):
    """A file of torch's with another zip directory: `change(name)` -> (offset to add, size to set or None)."""
    torch.save({"a": torch.arange(64.0), "b": torch.arange(64.0)}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
        for info in archive.infolist():
            size, extra, comment = struct.unpack("<HHH", data[at + 28 : at + 34])
            moved, length = change(info.filename)
            offset = info.header_offset + moved
            data[at + 42 : at + 46] = struct.pack("<I", offset)
            if length is not None:
                data[at + 20 : at + 28] = struct.pack("<II", length, length)
            at += 46 + size + extra + comment
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda name: (-64 if name.endswith("data/1") else 0, None),
        lambda name: (1 << 20 if name.endswith("data/0") else 0, None),
        lambda name: (0, 1 << 20 if name.endswith("data/0") else None),
        lambda name: (0, 8 if name.endswith("data/0") else None),
    ],
    ids=["elsewhere", "outside", "too long", "too short"],
)
def test_a_directory_that_lies(tmp_path, change):
    with pytest.raises(InputError, match=r"m\.bin is not a whole torch state dict") as error:
        tensors.open_checkpoint(members(tmp_path / "m.bin", change))
    assert "\n" not in str(error.value)


def test_overlapping_members(tmp_path):
    torch.save({"a": torch.arange(64.0), "b": torch.arange(64.0)}, tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as archive:
        first, second = (info.header_offset for info in archive.infolist() if "/data/" in info.filename)
    with pytest.raises(InputError, match=r"m\.bin is not a whole torch state dict .*overlap"):
        moved = members(tmp_path / "m.bin", lambda name: (first - second if "data/1" in name else 0, None))
        tensors.open_checkpoint(moved)


def test_one_name_twice(tmp_path):
    torch.save({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}, tmp_path / "m.bin")
    with pytest.raises(InputError, match=r"it holds 'a\.b' twice"):
        tensors.open_checkpoint(tmp_path / "m.bin")
