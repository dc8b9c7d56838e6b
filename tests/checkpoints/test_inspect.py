"""`pivotjax inspect`: what is in a checkpoint, in a table and in JSON."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folders as tiny
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from pivotjax.checkpoints import store, torch_bridge
from pivotjax.models import projector


def a_projector(seed=3):
    return projector.init("mlp2x_gelu", 6, 4, jax.random.key(seed), 1.0)


@pytest.fixture
def inspected(done):
    """What a checkpoint is, as JSON."""
    return lambda path: json.loads(done("inspect", path, "--json").out)


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_it_says_what_a_projector_is(inspected, tmp_path, kind):
    params = a_projector()
    info = {"name": "expert:cats", "init_id": "one", "domains": ["cats"], "versions": {"jax": "1"}}
    path = tmp_path / ("p" if kind == "orbax" else "p.safetensors")
    (store.save_projector if kind == "orbax" else torch_bridge.save_torch)(path, params, info)
    found = inspected(path)
    assert found | info == found
    assert (found["path"], found["kind"], found["format"]) == (str(path), "projector", kind)
    assert found["parameters"] == 6 * 4 + 4 + 4 * 4 + 4
    assert found["tensors"]["linear_0.kernel"] == "float32[6, 4]" and len(found["tensors"]) == 4
    assert found["finite"] is True and found["fingerprint"] == projector.fingerprint(params)


def test_it_says_what_another_s_projector_is(inspected, tmp_path):
    torch.save({"model.mm_projector.weight": torch.zeros(4, 6, dtype=torch.float16),
                "model.mm_projector.bias": torch.zeros(4, dtype=torch.float16)}, tmp_path / "mm_projector.bin")
    found = inspected(tmp_path / "mm_projector.bin")
    digest = hashlib.sha256((tmp_path / "mm_projector.bin").read_bytes()).hexdigest()
    assert found["sha256"] == {"mm_projector.bin": digest} and found["dtypes"] == ["float16"]
    assert found["tensors"] == {"linear_0.bias": "float16[4]", "linear_0.kernel": "float16[6, 4]"}


def test_it_says_that_numbers_are_not_finite(inspected, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), a_projector())
    store.save_projector(tmp_path / "p", params, {})
    assert inspected(tmp_path / "p")["finite"] is False


PARTS = ("vision", "projector", "language")


def test_a_model_in_three_formats(inspected, done, tmp_path):
    folder = tiny.save(tiny.whole("llava", dtype=torch.bfloat16), tmp_path / "hf", max_shard_size="2KB")
    done("convert", folder, tmp_path / "orbax")
    done("convert", folder, tmp_path / "vision", "--part", "vision", "--to", "hf")
    done("convert", folder, tmp_path / "llava", "--to", "llava", "--vision", tmp_path / "vision")
    hf, orbax, llava = (inspected(tmp_path / name) for name in ("hf", "orbax", "llava"))
    for found, kind in ((hf, "hf"), (orbax, "orbax"), (llava, "llava")):
        assert (found["kind"], found["format"], found["family"]) == ("model", kind, "llava")
        assert set(found["parts"]) == set(PARTS) and found["dtypes"] == ["bfloat16"] and found["finite"] is True
    assert hf["parts"] == {part: orbax["parts"][part] for part in hf["parts"]}
    assert hf["parts"]["projector"] == {"tensors": 4, "parameters": 480, "dtypes": ["bfloat16"]}
    assert hf["parameters"] == sum(part["parameters"] for part in hf["parts"].values()) == hf["bytes"] // 2
    for file, digest in hf["sha256"].items():
        assert digest == hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert len(hf["sha256"]) > 1 and orbax["source"] == {"path": "hf", "format": "hf"}
    assert orbax["tensors"]["language/layers/1/q/kernel"] == "bfloat16[16, 16]"


def test_the_table(done, tmp_path):
    folder = tiny.save(tiny.whole("llava"), tmp_path / "hf")
    shown = done("inspect", folder).out
    assert "family: llava" in shown and "finite: true" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["part", "tensors", "parameters", "dtypes"] in rows and ["projector", "4", "480", "float32"] in rows
    assert ["all", "64", "8,032", "float32"] in rows
    assert "multi_modal_projector.linear_1.weight" not in shown
    rows = [line.split() for line in done("inspect", folder, "--tensors").out.splitlines()]
    assert ["multi_modal_projector.linear_1.weight", "float32[16,", "12]"] in rows


def test_what_cannot_be_converted_is_still_inspected(inspected, tmp_path):
    folder = tiny.save(tiny.text("llama"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "gpt9"}))
    found = inspected(folder)
    assert found["family"] == "gpt9" and "model_type 'gpt9' is not supported" in found["note"]
    assert found["parts"]["model.layers"]["tensors"] == 18 and found["parts"]["lm_head"]["parameters"] == 24 * 16
    (folder / "config.json").unlink()
    assert inspected(folder)["kind"] == "tensors"
    found = inspected(folder / "model.safetensors")
    assert found["kind"] == "tensors" and found["parameters"] == sum(
        tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_a_lora_adapter(inspected, tmp_path):
    held = {"base_model.model.q.lora_A.weight": np.zeros((2, 8), np.float32),
            "base_model.model.q.lora_B.weight": np.zeros((8, 2), np.float32)}  # fmt: skip
    save_file(held, tmp_path / "adapter_model.safetensors")
    said = {"base_model_name_or_path": "llama", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"peft_type": "LORA"}))
    found = inspected(tmp_path)
    assert found["kind"] == "adapter" and found | said == found and found["parameters"] == 32


def test_nothing_is_held_whole(done, tmp_path):
    """Forty tensors of a megabyte; a few are in memory at a time."""
    save_file({f"t.{i}.weight": np.ones((512, 512), np.float32) for i in range(40)}, tmp_path / "m.safetensors")
    tracemalloc.start()
    done("inspect", tmp_path / "m.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


def test_nothing_there(refused, tmp_path):
    assert "no checkpoint at" in refused("inspect", tmp_path / "none")
    assert "holds no checkpoint" in refused("inspect", tmp_path)
