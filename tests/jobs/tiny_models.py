"""Whole models of a few kilobytes on disk, as Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

BLOCKS = 3


def tensors(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A base (seed 0) and experts near it."""
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)}
    for i in range(BLOCKS):
        stem = f"model.layers.{i}."
        shapes |= {f"{stem}mlp.up_proj.weight": (16, 8), f"{stem}mlp.up_proj.bias": (16,), f"{stem}norm.weight": (8,)}
    shapes["vision.patch.weight"] = (6, 3, 2, 2)
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    held = {}
    for name, shape in shapes.items():
        start = base.normal(size=shape)
        held[name] = (start + 0.3 * own.normal(size=shape) * bool(seed)).astype(dtype)
    return held | {"model.positions": np.arange(4)}


def write(path: Path, seed: int, *, shards: int = 1, dtype: Any = np.float32, **changes: np.ndarray | None) -> Path:
    """A model's folder; `changes` replace tensors (None: leave out), with `__` for the dots of their names."""
    path.mkdir(parents=True)
    held = tensors(seed, dtype) | {name.replace("__", "."): value for name, value in changes.items()}
    held = {name: value for name, value in held.items() if value is not None}
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "torch_dtype": "float32"}))
    (path / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(held, path / "model.safetensors")
        return path
    where = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(held)}
    for file in set(where.values()):
        save_file({name: held[name] for name in held if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's folder."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}
