"""Models and projectors that are broken or mean harm: one line, status 2, nothing executed, nothing left behind."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_folders as tiny
import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.save(tiny.text("llama"), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def model(original, tmp_path):
    """A model of one file, to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def shards(model):
    """A model of two files, to be spoilt."""
    state = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    where = {}
    for i, part in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, model / file)
        where |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


@pytest.fixture
def refuses(refused, tmp_path):
    """`refuses(path, said, ...)`: neither convert nor anything it has begun is there after the one line."""

    def check(path, said, *options, name="out"):
        before = sorted(os.listdir(tmp_path))
        line = refused("convert", path, tmp_path / name, *options)
        assert said in line, line
        assert sorted(os.listdir(tmp_path)) == before
        return line

    return check


def changed(folder, **tensors):
    """Rewrites a model's file with other tensors (None: without it); `__` stands for dots."""
    state = load_file(folder / SINGLE)
    state |= {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in state.items() if value is not None}, folder / SINGLE)


def header(file, change):
    """Rewrites the header of a safetensors file: `change(text) -> text`."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_the_model_is_fine_before_it_is_spoilt(model, shards, done, tmp_path):
    done("convert", shards, tmp_path / "out")


# Files of tensors.


def test_a_length_that_lies(model, refuses):
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    refuses(model, "is not a whole safetensors file (its header would have")


def test_a_shape_that_lies(model, refuses):
    header(model / SINGLE, lambda text: text.replace('"shape":[16,16]', '"shape":[16,17]', 1))
    refuses(model, "cannot have 1024 bytes")


def test_overlapping_tensors(model, refuses):
    def shared(text):
        entries = json.loads(text)
        entries[Q]["data_offsets"] = entries[Q.replace("layers.1", "layers.0")]["data_offsets"]
        return json.dumps(entries)

    header(model / SINGLE, shared)
    refuses(model, "overlap others")


def test_one_key_twice(model, refuses):
    header(model / SINGLE, lambda text: text.replace(Q, Q.replace("layers.1", "layers.0"), 1))
    refuses(model, "its header names 'model.layers.0.self_attn.q_proj.weight' twice")


def test_one_key_in_two_shards(shards, refuses):
    state = load_file(shards / "model-00001-of-00002.safetensors")
    other = shards / "model-00002-of-00002.safetensors"
    save_file(load_file(other) | {next(iter(state)): next(iter(state.values()))}, other)
    refuses(shards, "both hold")


def test_two_names_of_one_tensor(model, refuses):
    """A tower with and without `vision_model.`: which one counts?"""
    folder = tiny.save(tiny.tower("clip"), model.parent / "tower")
    state = load_file(folder / SINGLE)
    key = next(name for name in state if name.endswith("patch_embedding.weight"))
    other = key.removeprefix("vision_model.") if key.startswith("vision_model.") else f"vision_model.{key}"
    changed(folder, **{other.replace(".", "__"): state[key].clone()})
    refuses(folder, "are the same tensor")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_truncated_shard(shards, refuses, keep):
    file = shards / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(shards, f"{file} is not a whole safetensors file")


def test_a_missing_shard(shards, refuses):
    (shards / "model-00002-of-00002.safetensors").unlink()
    refuses(shards, "names shards that are not there (model-00002-of-00002.safetensors)")


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/passwd", "sub/../../x", "..", ""])
def test_an_index_that_names_a_file_outside(shards, refuses, outside):
    shutil.copytree(shards, shards.parent / "other")
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][Q] = outside
    (shards / INDEX).write_text(json.dumps(index))
    refuses(shards, f"names the file {outside!r}, which is not inside it")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", "[" * 100_000])
def test_an_index_that_is_none(shards, refuses, text):
    (shards / INDEX).write_text(text)
    refuses(shards, INDEX)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(model, refuses, tmp_path, name):
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    refuses(model, f"{model / name} is a link out of its folder")


def test_links_of_the_hub_s_cache_are_followed(original, done, refuses, tmp_path):
    """And of no other repository's."""
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots/abc").mkdir(parents=True)
    for i, path in enumerate(original.iterdir()):
        shutil.copy(path, home / f"blobs/{i}")
        (home / "snapshots/abc" / path.name).symlink_to(f"../../blobs/{i}")
    done("convert", home / "snapshots/abc", tmp_path / "out")
    done("convert", tmp_path / "out", tmp_path / "back")
    assert load_file(tmp_path / "back" / SINGLE).keys() == load_file(original / SINGLE).keys()
    other = tmp_path / "models--owner--other/blobs"
    other.mkdir(parents=True)
    (home / "snapshots/abc" / SINGLE).resolve().rename(other / "0")
    (home / "snapshots/abc" / SINGLE).unlink()
    (home / "snapshots/abc" / SINGLE).symlink_to("../../../models--owner--other/blobs/0")
    refuses(home / "snapshots/abc", "is a link out of its folder", name="out2")


# Pickles.


class Runs:
    """Unpickles by running a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["a model", "a shard", "a projector"])
def test_a_pickle_that_would_run_code(model, refuses, tmp_path, kind):
    ran = tmp_path / "ran"
    file = {"a model": "pytorch_model.bin", "a shard": "pytorch_model-00001-of-00001.bin"}.get(kind, "mm_projector.bin")
    (model / SINGLE).unlink()
    if kind == "a shard":
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {Q: file}}))
    with zipfile.ZipFile(model / file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"0.weight": Runs(f"touch {ran}")}, 2))
        archive.writestr("archive/version", "3\n")
    refuses(model / file if kind == "a projector" else model, "refused: its pickle names posix.system")
    assert not ran.exists()
    with pytest.raises(SystemExit):
        from pivotjax import cli

        cli.main(["inspect", str(model / file)])
    assert not ran.exists()


def test_a_truncated_pickle(model, refuses):
    torch.save(load_file(model / SINGLE), model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    file = model / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuses(model, "is not a whole torch state dict")


def test_a_damaged_tensor_in_a_pickle(model, refuses):
    """Found when it is read, when much has been written already."""
    state = load_file(model / SINGLE)
    torch.save(state, model / "pytorch_model.bin")
    (model / SINGLE).unlink()
    data = bytearray((model / "pytorch_model.bin").read_bytes())
    data[data.index(state[Q].numpy().tobytes()) + 100] ^= 1
    (model / "pytorch_model.bin").write_bytes(data)
    refuses(model, "are damaged (CRC-32)")


# What ZeRO-3 leaves.


def test_an_empty_tensor_of_a_model(model, refuses):
    changed(model, **{Q.replace(".", "__"): torch.zeros(0)})
    line = refuses(model, f"{Q} is empty, as DeepSpeed's ZeRO-3 leaves parameters that were not gathered")
    assert "stage3_gather_16bit_weights_on_model_save" in line and "zero_to_fp32.py" in line


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_an_empty_projector(refuses, tmp_path, suffix):
    held = {f"model.mm_projector.{i}.{leaf}": torch.zeros(0) for i in (0, 2) for leaf in ("weight", "bias")}
    file = tmp_path / f"mm_projector.{suffix}"
    (torch.save if suffix == "bin" else save_file)(held, file)
    assert "zero_to_fp32.py" in refuses(file, "model.mm_projector.0.bias is empty" if suffix != "bin" else "is empty")
    (tmp_path / "folder").mkdir()
    shutil.copy(file, tmp_path / "folder" / file.name)
    refuses(tmp_path / "folder", "is empty, as DeepSpeed's ZeRO-3 leaves")


# What does not go with config.json.


def configured(model, **fields):
    config = json.loads((model / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value is not ...}
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gpt9"}, "model_type 'gpt9' is not supported; known: "),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 3}, "9 missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "9 unknown: model.layers.1."),
        ({"vocab_size": 25}, "has shape [24, 16]; the model's config needs [25, 16]"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_a_wrong_config(model, refuses, fields, said):
    configured(model, **fields)
    refuses(model, said)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"llama"', "[" * 100_000])
def test_a_config_that_is_none(model, refuses, text):
    (model / "config.json").write_text(text)
    refuses(model, "config.json")


def test_no_config(model, refuses):
    (model / "config.json").unlink()
    refuses(model, "there is no config.json beside it")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [..., None, 3, {}, {"model_type": "gpt9"}, {"hidden_size": None}])
def test_a_wrong_config_of_a_part(refuses, tmp_path, part, value):
    folder = tiny.save(tiny.whole("llava"), tmp_path / "llava")
    configured(folder, **{part: value})
    refuses(folder, "")


def test_a_tensor_too_many_and_one_too_few(model, refuses):
    changed(model, **{Q.replace(".", "__"): None, "model__layers__1__self_attn__q_proj__weights": torch.zeros(16, 16)})
    line = refuses(model, f"1 missing: {Q} (nearest: {Q}s); 1 unknown: {Q}s (nearest: {Q})")
    assert "is it another architecture?" in line


def test_a_lora_adapter_is_no_model(model, refuses):
    (model / SINGLE).rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    refuses(model, "merge it into its base model first")


# Numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none(model, refuses, command, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in load_file(model / SINGLE).items()}
    state[Q][3, 4] = value
    save_file(state, model / SINGLE)
    refuses(model, f"{Q} holds values that are not finite")
    refuses(model, f"{Q} holds values that are not finite", "--to", "hf")
    found = json.loads(command("inspect", model, "--json").out)
    assert found["finite"] is False and found["not_finite"] == [Q]


def test_numbers_too_large_for_the_dtype(model, refuses):
    changed(model, **{Q.replace(".", "__"): torch.full((16, 16), 1e5)})
    refuses(model, f"{Q} holds values that are too large for float16", "--dtype", "float16")


def test_a_projector_with_nan(refuses, tmp_path):
    held = {"0.weight": torch.full((4, 6), torch.nan), "0.bias": torch.zeros(4)}
    torch.save(held, tmp_path / "mm_projector.bin")
    refuses(tmp_path / "mm_projector.bin", "linear_0/kernel of the projector holds values that are not finite")


# Orbax.


@pytest.fixture
def orbax(model, done, tmp_path):
    done("convert", model, tmp_path / "orbax")
    return tmp_path / "orbax"


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "missing", "config", "no sizes", "flipped", "link"])
def test_a_damaged_orbax_checkpoint(orbax, refuses, tmp_path, damage):
    file, said = largest(orbax / "state"), "is not a whole Orbax checkpoint"
    if damage in ("truncated", "no sizes"):
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    if damage == "no sizes":
        (orbax / "sizes.json").unlink()
    if damage == "flipped":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        said = "are damaged (CRC-32)"
    if damage == "missing":
        file.unlink()
    if damage == "config":
        about = json.loads((orbax / "_CHECKPOINT_METADATA").read_text())
        about["custom_metadata"]["config"]["num_hidden_layers"] = 3
        (orbax / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
        (orbax / "sizes.json").unlink()
        said = "9 missing: language/layers/2/"
    if damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        said = "is a link out of its folder"
    refuses(orbax, said)


def test_an_orbax_checkpoint_of_something_else(refuses, tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "other", {"a": np.zeros(3)})
    refuses(tmp_path / "other", "is not a projector checkpoint of pivotjax")
