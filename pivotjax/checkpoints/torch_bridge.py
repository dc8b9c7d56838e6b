"""Projectors to and from PyTorch: LLaVA's key names, torch's `[d_out, d_in]` layout, safetensors files."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pivotjax import files
from pivotjax.checkpoints.names import is_empty
from pivotjax.errors import InputError
from pivotjax.models import projector

# LLaVA's nn.Sequential counts the activations between the linear layers, hence the even numbers.
_KEY = re.compile(r"(?:model\.)?(?:mm_projector\.)?(?:(?P<index>\d+)\.)?(?P<leaf>weight|bias)")
_PREFIX = "model.mm_projector."
_RANKS = {"weight": 2, "bias": 1}


def names_a_projector(names: Iterable[str]) -> bool:
    """Whether these (and no others) are the tensor names of one whole projector."""
    found = [_KEY.fullmatch(name) for name in names]
    if not found or not all(found):
        return False
    held = {(int(one["index"] or 0), one["leaf"]) for one in found}
    return held == {(2 * i, leaf) for i in range(len(found) // 2) for leaf in ("weight", "bias")}


def to_torch(params: projector.Params, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """`{"model.mm_projector.0.weight": [d_out, d_in], "model.mm_projector.0.bias": [d_out], ...}`; the second
    layer has number 2, and a single layer is LLaVA's `linear`, without a number. `names`, of another file of such
    a projector, are used instead."""
    tensors = {}
    if names is not None:
        for name in names:
            found = _KEY.fullmatch(name)
            layer = params[f"linear_{int(found['index'] or 0) // 2}"]
            tensors[name] = _torch_leaf(layer, found["leaf"])
        return tensors
    for i in range(len(params)):
        stem = _PREFIX if len(params) == 1 else f"{_PREFIX}{2 * i}."
        for leaf in ("weight", "bias"):
            tensors[f"{stem}{leaf}"] = _torch_leaf(params[f"linear_{i}"], leaf)
    return tensors


def _torch_leaf(layer: dict, leaf: str) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(layer["kernel"]).T) if leaf == "weight" else np.asarray(layer["bias"])


def from_torch(tensors: dict[str, np.ndarray], where: str) -> projector.Params:
    """Inverse of `to_torch`; every key must belong to the projector."""
    params: projector.Params = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if not found or int(found["index"] or 0) % 2:
            raise InputError(
                f"{where}: {key!r} is no key of an `mm_projector`; expected model.mm_projector.{{0,2}}.{{weight,bias}}"
            )
        if not value.size:
            raise is_empty(key, where)
        if value.ndim != _RANKS[found["leaf"]]:
            raise InputError(f"{where}: {key} has shape {list(value.shape)}, as no linear layer's {found['leaf']} has")
        layer = params.setdefault(f"linear_{int(found['index'] or 0) // 2}", {})
        layer["kernel" if found["leaf"] == "weight" else "bias"] = value.T if found["leaf"] == "weight" else value
    names = [f"linear_{i}" for i in range(len(params))]
    if not params or any(set(params.get(name, ())) != {"kernel", "bias"} for name in names):
        raise InputError(
            f"{where}: layers {sorted(params)} are not a whole projector (weight and bias of each of 0, 2, ...)"
        )
    return {name: params[name] for name in names}


def save_torch(
    path: Path, params: projector.Params, info: dict[str, Any], names: Iterable[str] | None = None
) -> None:
    """Writes a projector as a safetensors file for torch code; `info` goes into its metadata as JSON."""
    files.write_bytes(path, save(to_torch(params, names), metadata={"format": "pt", "pivotjax": json.dumps(info)}))


def load_torch(path: Path) -> tuple[projector.Params, dict[str, Any]]:
    """Reads a projector's safetensors file; the second value is its `info`, empty if another program wrote it."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give the path of a projector's .safetensors file")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            info = json.loads((file.metadata() or {}).get("pivotjax", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); save or copy it again") from error
    return from_torch(tensors, str(path)), info
