"""LoRA adapters as PEFT saves them, seen as what they add to a model: the products `scale B A`, module by module.

Two adapters may hold the same update in different factors (`B R^-1`, `R A`), so merging factors mixes what does not
belong together; products are what can be merged. A merged product goes back to disk as factors of a rank that the
user may choose.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from pivotjax import files
from pivotjax.checkpoints.tensors import Checkpoint, Spec
from pivotjax.errors import InputError
from pivotjax.merging import spectral

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds LoRA factors."""
    return any(".lora_" in name for name in checkpoint.specs)


class Adapter(Checkpoint):
    """An adapter's products as tensors `MODULE.weight`, float32 `[d_out, d_in]`, beside what else it holds (trained
    biases, `modules_to_save`).

    Args:
        checkpoint: of the factors, open; it is closed with this one.
        config: `adapter_config.json`.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]):
        self.path, self.config, self._held = checkpoint.path, dict(config), checkpoint
        found: dict[str, dict[str, str]] = {}
        for name in checkpoint.specs:
            if match := _FACTOR.fullmatch(name):
                found.setdefault(match[1], {})[match[2]] = name
        self._factors = {f"{module}.weight": (pair.get("A"), pair.get("B")) for module, pair in found.items()}
        self._check()
        held = {factor for pair in self._factors.values() for factor in pair}
        self.others = {name: spec for name, spec in checkpoint.specs.items() if name not in held}
        self.specs = {name: self._product(*pair) for name, pair in self._factors.items()} | self.others

    def _check(self) -> None:
        for name, pair in self._factors.items():
            if None in pair:
                raise InputError(f"{self.path}: {name!r} has one LoRA factor of two; save the adapter again")
            a, b = (self._held.specs[factor].shape for factor in pair)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise InputError(f"{self.path}: the LoRA factors of {name!r} have shapes {list(a)} and {list(b)}; only "
                                 "those of linear layers can be merged")
        other = next((name for name in self._held.specs if ".lora_" in name and not _FACTOR.fullmatch(name)), None)
        if other or self.config.get("use_dora"):
            raise InputError(f"{self.path}: {other or 'DoRA'} is no plain LoRA of a linear layer; merge the adapter "
                             "into its base model, and the models")

    def _product(self, a: str, b: str) -> Spec:
        return Spec(np.dtype(np.float32), (self._held.specs[b].shape[0], self._held.specs[a].shape[1]))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self._held.specs[a].shape[0] for a, _ in self._factors.values())

    def scale(self, name: str) -> float:
        """alpha / r of a product (alpha / sqrt(r) for rank-stabilised LoRA)."""
        rank = self._held.specs[self._factors[name][0]].shape[0]
        patterns = self.config.get("alpha_pattern") or {}
        module = name.removesuffix(".weight")
        alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
                     self.config.get("lora_alpha", rank))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def read(self, name: str) -> np.ndarray:
        if name not in self._factors:
            return self._held.read(name)
        a, b = (self._held.read(factor).astype(np.float32) for factor in self._factors[name])
        return np.float32(self.scale(name)) * (b @ a)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        return {WEIGHTS: tuple(self.specs)}

    def position(self, name: str) -> tuple[int, int]:
        return self._held.position(self._factors[name][0] if name in self._factors else name)

    def digests(self) -> dict[str, str]:
        return self._held.digests()

    def close(self) -> None:
        self._held.close()


def open_adapter(checkpoint: Checkpoint, folder: Path) -> Adapter:
    """The products of an adapter whose `adapter_config.json` lies in `folder`."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{checkpoint.path} holds LoRA factors, but no {CONFIG} beside it tells their alpha; give the "
                         "adapter's folder")
    return Adapter(checkpoint, files.read_json(folder / CONFIG))


def check_same_scale(folders: Mapping[str, Path]) -> None:
    """InputError unless all adapters multiply their factors by the same alpha / r: else factors cannot be merged."""
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    seen = {name: {key: files.read_json(folder / CONFIG).get(key) or None for key in keys}
            for name, folder in folders.items()}
    (first, config), *rest = seen.items()
    for name, other in rest:
        key = next((key for key in keys if other[key] != config[key]), None)
        if key:
            raise InputError(f"{first} has {key} {config[key]} and {name} has {other[key]}: their LoRA factors cannot "
                             "be merged; leave out --lora factors")


class AdapterWriter:
    """Takes merged products and writes them as factors, with a config of their rank and alpha (scale 1).

    Args:
        folder: exists.
        donor: the adapter whose names, dtypes and config the result takes.
        rank: of the result; every module keeps the best approximation of that rank.
    """

    def __init__(self, folder: Path, donor: Adapter, rank: int):
        self._folder, self._donor, self.rank = folder, donor, rank
        self._tensors: dict[str, np.ndarray] = {}
        self.kept: dict[str, float] = {}  # share of each product's squared norm that the rank keeps

    def write(self, name: str, tensor: np.ndarray) -> None:
        """One product (or other tensor) of the donor's specs."""
        if name not in self._donor._factors:
            self._tensors[name] = tensor
            return
        a, b = self._donor._factors[name]
        dtype = self._donor._held.specs[a].dtype
        rank = min(self.rank, *tensor.shape)
        left, right, kept = jax.device_get(_factors(jnp.asarray(tensor), rank))
        room = self.rank - rank  # one rank in the config for all: small modules get idle directions
        self._tensors[b] = np.pad(left, ((0, 0), (0, room))).astype(dtype)
        self._tensors[a] = np.pad(right, ((0, room), (0, 0))).astype(dtype)
        self.kept[name] = float(kept)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        config = self._donor.config | {"r": self.rank, "lora_alpha": self.rank, "use_rslora": False}
        config |= {key: {} for key in ("rank_pattern", "alpha_pattern") if config.get(key)}
        files.write_bytes(self._folder / WEIGHTS, save(self._tensors, metadata={"format": "pt"}))
        files.write_bytes(self._folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


@partial(jax.jit, static_argnums=1)
def _factors(product: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`B [d_out, r]`, `A [r, d_in]` of the best approximation of a product, and its share of the squared norm. A linear
    merge has rank K r at most, where the range finder is exact."""
    u, sigma, v = spectral.randomized(product, rank)
    root = jnp.sqrt(sigma)
    whole = (product * product).sum(-1).sum(-1)
    return u * root, (v * root).T, (sigma * sigma).sum() / jnp.where(whole > 0, whole, 1)
