"""What a merge reads: projector checkpoints (Orbax, safetensors, `mm_projector.bin`) and whole models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from pivotjax.checkpoints import folders, lora, store, tensors, torch_bridge
from pivotjax.checkpoints.tensors import Checkpoint
from pivotjax.errors import InputError
from pivotjax.merging.recipe import BASES, MergeRecipe

THE_BASE = "the base"
_PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")  # as LLaVA's folders of pre-trained projectors name them


@dataclass(frozen=True)
class Input:
    """One checkpoint.

    Fields:
        path: as given.
        checkpoint: its tensors in torch's layout, open; None for Orbax.
        projector: it, if all its tensors are those of one projector.
    """

    path: Path
    checkpoint: Checkpoint | None
    projector: store.Projector | None

    @property
    def format(self) -> Literal["orbax", "safetensors", "bin"]:
        if self.checkpoint is None:
            return "orbax"
        return "bin" if self.checkpoint.path.suffix in tensors.PICKLES else "safetensors"

    def provenance(self) -> dict[str, Any]:
        """Path and hashes, for the report; what has not been read yet is read for them."""
        if self.checkpoint is None:
            return {"path": str(self.path), "fingerprint": self.projector.info["fingerprint"]}
        return {"path": str(self.path), "sha256": self.checkpoint.digests()}


@dataclass(frozen=True)
class Opened:
    """Everything that a recipe names.

    Fields:
        experts: by name.
        base: what updates are measured from, if it is a checkpoint.
        donor: whose format, names and small files the result takes.
    """

    experts: Mapping[str, Input]
    base: Input | None
    donor: Input

    @property
    def named(self) -> dict[str, Input]:
        """All, the base first."""
        return ({THE_BASE: self.base} if self.base else {}) | dict(self.experts)

    @property
    def are_projectors(self) -> bool:
        """Whether all are projectors (and can be merged as such)."""
        return all(one.projector is not None for one in self.named.values())

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: Any) -> None:
        for one in {id(one): one for one in (*self.named.values(), self.donor)}.values():
            if one.checkpoint is not None:
                one.checkpoint.close()


def open_all(plan: MergeRecipe, factors: bool = False) -> Opened:
    """Opens what a recipe names; InputError says which is missing, broken or of no kind that can be merged.

    `factors`: LoRA adapters are opened as their factors A and B, else as the products that they add to a model.
    """
    opened: dict[str, Input] = {}

    def once(path: str) -> Input:
        if path not in opened:
            opened[path] = open_input(Path(path), factors)
        return opened[path]

    base = once(plan.base_model) if plan.base_model not in (None, *BASES) else None
    experts = {name: once(path) for name, path in plan.models}
    donor = once(plan.donor) if plan.donor else base or next(iter(experts.values()))
    found = Opened(experts, base, donor)
    if factors:
        lora.check_same_scale({name: one.path for name, one in found.experts.items()})
    kinds = {name: one.projector is not None for name, one in found.named.items()}
    orbax = next((name for name, one in found.named.items() if one.checkpoint is None), None)
    adapters = {name: isinstance(one.checkpoint, lora.Adapter) for name, one in found.named.items()}
    if any(adapters.values()) and not all(adapters.values()):
        one, other = (next(name for name, is_one in adapters.items() if is_one is kind) for kind in (True, False))
        raise InputError(f"{one} is a LoRA adapter and {other} is not; adapters are merged with adapters, from base "
                         "zero")
    if orbax and not found.are_projectors:
        other = next(name for name, is_projector in kinds.items() if not is_projector)
        raise InputError(f"{orbax} is a projector and {other} is not; merge projectors with projectors")
    return found


def open_input(path: Path, factors: bool = False) -> Input:
    """One checkpoint of any format."""
    if not path.exists():
        raise InputError(f"no checkpoint at {path}; give a projector checkpoint, a safetensors file, a model's folder "
                         "or mm_projector.bin (nothing is downloaded)")
    weights = weights_of(path)
    if weights is None:
        return Input(path, None, store.load_projector(path))
    checkpoint = tensors.open_checkpoint(weights)
    if lora.is_adapter(checkpoint) and not factors:
        return Input(path, lora.open_adapter(checkpoint, path if path.is_dir() else path.parent), None)
    return Input(path, checkpoint, _projector(weights, checkpoint))


def weights_of(path: Path) -> Path | None:
    """The file or folder with the tensors; None for an Orbax checkpoint."""
    if not path.is_dir():
        return path
    if folders.holds_weights(path):
        return path
    if (path / lora.CONFIG).exists() or (path / lora.WEIGHTS).exists():
        return next(path.glob("adapter_model.*"), path)
    return next((path / name for name in _PROJECTORS if (path / name).is_file()),
                path if (path / "config.json").exists() else None)


def _projector(weights: Path, checkpoint: Checkpoint) -> store.Projector | None:
    if not torch_bridge.names_a_projector(checkpoint.specs):
        return None
    if weights.suffix in tensors.PICKLES:
        held = {name: checkpoint.read(name) for name in checkpoint.specs}
        return store.Projector(torch_bridge.from_torch(held, str(weights)), {})
    return store.Projector(*torch_bridge.load_torch(weights)) if weights.is_file() else None


def common_tensors(checkpoints: Mapping[str, Checkpoint], donor: Checkpoint, allow_missing: bool) -> list[str]:
    """Which of the donor's tensors cannot be merged because not all have them in one shape.

    Raises:
        InputError: there are such tensors, or others that the donor does not have, and they are not allowed.
    """
    differing: dict[str, str] = {}
    for name in dict.fromkeys(name for one in (donor, *checkpoints.values()) for name in one.specs):
        shapes = {who: one.specs[name].shape for who, one in checkpoints.items() if name in one.specs}
        lacking = next((who for who in checkpoints if who not in shapes), None)
        if lacking:
            differing[name] = f"{lacking} has no tensor {name!r}" + (f" ({next(iter(shapes))} has)" if shapes else "")
        elif len(set(shapes.values())) > 1:
            (first, shape), *rest = shapes.items()
            other, another = next((who, found) for who, found in rest if found != shape)
            differing[name] = f"{name!r} has shape {list(shape)} in {first} and {list(another)} in {other}"
    if differing and not allow_missing:
        said = "; ".join(list(differing.values())[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(f"{said}{more}: these cannot be merged; --allow-missing merges the common tensors alone")
    return [name for name in differing if name in donor.specs]


def dtypes_note(checkpoints: Mapping[str, Checkpoint], donor: Checkpoint) -> str | None:
    """A sentence if some tensor comes in several floating-point dtypes."""
    for name, spec in donor.specs.items():
        found = {who: one.specs[name].dtype for who, one in checkpoints.items() if name in one.specs}
        if len(set(found.values())) > 1 and jnp.issubdtype(spec.dtype, jnp.floating):
            said = ", ".join(f"{dtype} in {who}" for who, dtype in found.items())
            return f"dtypes differ ({name!r} is {said}): merged in float32 or wider"
    return None
