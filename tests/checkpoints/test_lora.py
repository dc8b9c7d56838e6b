"""LoRA adapters are merged as the products that they add to a model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pivotjax import cli

MODULES = {"base_model.model.layers.0.q_proj": (24, 16), "base_model.model.layers.1.q_proj": (12, 24)}


def adapter(folder, seed, rank=4, alpha=8, dtype=np.float32, **config):
    rng, tensors = np.random.default_rng(seed), {}
    for module, (d_out, d_in) in MODULES.items():
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(rank, d_in)).astype(dtype)
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(d_out, rank)).astype(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def products(folder):
    """What PEFT adds to each module's weight."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    scale = config["lora_alpha"] / root
    return {m: scale * tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in MODULES}


def merge(method, out, *experts, options=()):
    command = ["merge", "--method", method, "--base", "zero", "--out", str(out), *options]
    cli.main([*command, "--experts", *map(str, experts)])
    return products(out), json.loads((out / "merge_report.json").read_text())


def test_linear_merges_of_products_lose_nothing(tmp_path):
    """Ranks 4 and 3, different alphas, one rank-stabilised: the merged one of rank 7 adds the sum of what they add."""
    a = adapter(tmp_path / "a", 0)
    b = adapter(tmp_path / "b", 1, rank=3, alpha=5, use_rslora=True)
    merged, report = merge("task_arithmetic", tmp_path / "out", a, b, options=["--scale", "0.5"])
    for module, want in products(a).items():
        want = 0.5 * (want + products(b)[module])
        np.testing.assert_allclose(merged[module], want, atol=1e-5 * np.abs(want).max())
    assert report["lora"]["rank"] == 7 and min(report["lora"]["norm_kept"].values()) > 0.999999
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["r"] == config["lora_alpha"] == 7


def test_other_merges_keep_the_best_approximation(tmp_path):
    """TIES makes a full-rank update: rank 2 keeps its two leading triplets, and the report says what that is worth."""
    a, b = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1)
    merged, report = merge("ties", tmp_path / "out", a, b, options=["--density", "0.5", "--lora-rank", "2"])
    whole, _ = merge("ties", tmp_path / "whole", a, b, options=["--density", "0.5", "--lora-rank", "24"])
    for module, update in whole.items():
        u, s, vt = np.linalg.svd(update)
        np.testing.assert_allclose(merged[module], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4 * s[0])
        kept = report["lora"]["norm_kept"][f"{module}.weight"]
        assert kept == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-4) and kept < 0.9


def test_factors_as_they_are(tmp_path):
    a, b = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1)
    merge("average", tmp_path / "out", a, b, options=["--lora", "factors"])
    first, second, merged = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, (first[name] + second[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("spoil, words", [
    (lambda a, b: (b / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda a, b: adapter_with(b, use_dora=True), "DoRA"),
    (lambda a, b: halve(b), "one LoRA factor of two"),
])  # fmt: skip
def test_what_is_refused(tmp_path, capsys, spoil, words):
    a, b = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1)
    spoil(a, b)
    with pytest.raises(SystemExit) as stop:
        merge("ties", tmp_path / "out", a, b)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and not (tmp_path / "out").exists()


def test_factors_of_different_scale_are_refused(tmp_path, capsys):
    a, b = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, alpha=16)
    with pytest.raises(SystemExit) as stop:
        merge("average", tmp_path / "out", a, b, options=["--lora", "factors"])
    assert stop.value.code == 2 and "lora_alpha" in capsys.readouterr().err


def adapter_with(folder, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def halve(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
