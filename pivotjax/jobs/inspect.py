"""`pivotjax inspect CHECKPOINT`: what a checkpoint is, and whether it is whole and finite; it is never held whole."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import folders, hub, lora, names, store, tensors
from pivotjax.checkpoints.model_store import OrbaxModel
from pivotjax.checkpoints.tensors import Checkpoint, Spec
from pivotjax.errors import InputError
from pivotjax.jobs import merge_inputs, model_source
from pivotjax.models import projector
from pivotjax.progress import Bar

_REST = "not used"  # tensors that a model's family knows and does not need


@dataclass(frozen=True)
class InspectConfig:
    """Says what a checkpoint is: family, sizes, dtypes, hashes, where it comes from, whether all numbers are finite.

    A model (Hugging Face folder, LLaVA repository, Orbax), a projector, a LoRA adapter, or a file of tensors."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or file; hf://OWNER/NAME is downloaded."""
    tensors: bool = False
    """List all tensors."""
    json: bool = False
    """Print JSON."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    config = configs.overridden(InspectConfig(tyro.MISSING), args, "pivotjax inspect")
    found = describe(hub.located(config.checkpoint))
    print(json.dumps(found, indent=1) if config.json else _text(found, config.tensors))


def describe(path: Path | epath.Path) -> dict[str, Any]:
    """Kind, format, family, parts, tensors, finiteness, hashes and provenance of a checkpoint."""
    kind = model_source.kind_of(path)
    made = {"model": _model, "projector": _projector, "adapter": _adapter, "tensors": _tensors}[kind](path)
    return {"path": str(path), "kind": kind} | made


def _projector(path: Path) -> dict[str, Any]:
    params, info = model_source.read_projector(path)
    leaves = {jax.tree_util.keystr(at, simple=True, separator="."): np.asarray(leaf)
              for at, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    file = path if path.is_file() else None
    return {
        "format": path.suffix[1:] if file else "orbax",
        "name": info.get("name"),
        **_sizes({name: Spec(leaf.dtype, leaf.shape) for name, leaf in leaves.items()}),
        "finite": all(map(names.finite, leaves.values())),
        "fingerprint": projector.fingerprint(params),
        **({"sha256": {file.name: files.sha256(file)}} if file else {}),
        **{key: value for key, value in info.items() if key not in ("format", "name", "fingerprint")},
    }


def _model(path: Path) -> dict[str, Any]:
    """A model whose family is known; where it is not (or does not match), what its files hold."""
    try:
        source = model_source.open_source(path, images_only=True, hashed=True)
    except InputError as error:
        if store.is_orbax(path):
            raise
        settings = files.read_json(path / folders.CONFIG)
        family = settings.get("model_type") if isinstance(settings, Mapping) else None
        return {"family": family, **_tensors(path), "note": f"it cannot be converted as it is: {error}"}
    with source:
        of = {(id(one.checkpoint), key): at.split("/")[0] for at, one in source.held.items() for key in one.keys}
        found: dict[str, Any] = {"format": source.format, "family": source.layout.family}
        specs, parts = {}, {}
        for checkpoint in source.checkpoints:
            specs |= checkpoint.specs
            parts |= {name: of.get((id(checkpoint), name), _REST) for name in checkpoint.specs}
        found |= _sizes(specs, parts) | _seen(*map(_read, source.checkpoints))
    said = store.custom_metadata(path)
    return found | {key: said[key] for key in ("source", "versions") if key in said}


def _adapter(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    with tensors.open_checkpoint(merge_inputs.weights_of(path)) as checkpoint:
        said = files.read_json(folder / lora.CONFIG) if (folder / lora.CONFIG).is_file() else {}
        keys = ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
        adapter = {key: said[key] for key in keys if said.get(key) is not None}
        return {"format": _format(checkpoint), **adapter, **_sizes(checkpoint.specs), **_seen(_read(checkpoint))}


def _tensors(path: Path) -> dict[str, Any]:
    with tensors.open_checkpoint(path) as checkpoint:
        parts = {name: _stem(name) for name in checkpoint.specs}
        return {"format": _format(checkpoint), **_sizes(checkpoint.specs, parts), **_seen(_read(checkpoint))}


def _format(checkpoint: Checkpoint) -> str:
    return next((Path(name).suffix[1:] for name in checkpoint.files), "")


def _stem(name: str) -> str:
    """A tensor's name up to the first number, or its first two words: `model.layers`, `lm_head`."""
    words = re.split(r"\.\d+(?:\.|$)", name)[0].split(".")
    return ".".join(words[: 1 if words[-1] in ("weight", "bias") else 2])


def _sizes(specs: Mapping[str, Spec], parts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Counts of all, of each part, and every tensor's dtype and shape."""
    found = {"parameters": _count(specs.values()), "bytes": tensors.sizes(specs.values()),
             "dtypes": _dtypes(specs.values())}  # fmt: skip
    if parts is not None:
        groups = {part: [spec for name, spec in specs.items() if parts[name] == part]
                  for part in dict.fromkeys(parts.values())}  # fmt: skip
        found["parts"] = {
            part: {"tensors": len(held), "parameters": _count(held), "dtypes": _dtypes(held)}
            for part, held in groups.items()
        }
    shapes = {name: f"{spec.dtype}[{', '.join(map(str, spec.shape))}]" for name, spec in specs.items()}
    return found | {"tensors": shapes}


def _count(specs: Iterable[Spec]) -> int:
    return sum(spec.nbytes // spec.dtype.itemsize for spec in specs)


def _dtypes(specs: Iterable[Spec]) -> list[str]:
    return list(dict.fromkeys(str(spec.dtype) for spec in specs))


def _read(checkpoint: Checkpoint) -> tuple[list[str], dict[str, str]]:
    """Every tensor once: which are not finite, and the SHA-256 of each file (of all tensors, for Orbax)."""
    bad, total, done = [], tensors.sizes(checkpoint.specs.values()), 0
    together = hashlib.sha256()
    with Bar(total // 10**6, "read", unit="MB") as bar:
        for name in sorted(checkpoint.specs, key=checkpoint.position):
            tensor = checkpoint.read(name)
            if not names.finite(tensor):
                bad.append(name)
            if isinstance(checkpoint, OrbaxModel):
                together.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
                together.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
            before, done = done // 10**6, done + tensor.nbytes
            bar.update(done // 10**6 - before)
    return bad, {"tensors": together.hexdigest()} if isinstance(checkpoint, OrbaxModel) else checkpoint.digests()


def _seen(*read: tuple[list[str], dict[str, str]]) -> dict[str, Any]:
    """What was found out by reading."""
    bad = [name for names_, _ in read for name in names_]
    sha256 = {file: digest for _, digests in read for file, digest in digests.items()}
    return {"finite": not bad, **({"not_finite": bad} if bad else {}), "sha256": sha256}


def _text(found: Mapping[str, Any], all_tensors: bool) -> str:
    """For people: what it is, a table of its parts, then the rest."""
    tables = ("parts", "tensors", "parameters", "bytes", "dtypes")
    first = {key: found[key] for key in ("path", "kind", "format", "family", "name") if found.get(key) is not None}
    rest = {key: value for key, value in found.items() if key not in (*first, *tables) and value is not None}
    parts = found.get("parts", {}) | {"all": {**found, "tensors": len(found["tensors"])}}
    rows = [(part, f"{held['tensors']:,}", f"{held['parameters']:,}", ", ".join(held["dtypes"]))
            for part, held in parts.items()]  # fmt: skip
    lines = [configs.to_yaml(first).rstrip(), "", *_table(("part", "tensors", "parameters", "dtypes"), rows)]
    if all_tensors:
        lines += ["", *_table(("tensor", "dtype and shape"), list(found["tensors"].items()))]
    return "\n".join([*lines, "", configs.to_yaml(rest).rstrip()])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be; numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [all(row[i].replace(",", "").isdigit() for row in rows) for i in range(len(head))]

    def line(row):
        cells = (cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right))
        return "  ".join(cells).rstrip()

    return [line(head), *map(line, rows)]
