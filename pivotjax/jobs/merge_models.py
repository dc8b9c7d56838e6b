"""Whole models: which tensors are merged, where each goes, and the report; out of core where the method allows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pivotjax.checkpoints import folders, lora, tensors
from pivotjax.checkpoints.tensors import Checkpoint, Spec
from pivotjax.errors import InputError
from pivotjax.jobs import merge_inputs, out_of_core
from pivotjax.jobs.merge_inputs import Opened
from pivotjax.jobs.out_of_core import Found, Inputs, Merging
from pivotjax.merging import diagnostics, merge, registry, settings, siblings
from pivotjax.merging.recipe import BASES, MergeRecipe
from pivotjax.progress import say

_SHARD = 5_000_000_000  # bytes of a file, where the donor does not say


class Limits(NamedTuple):
    """Bytes: a chunk of the out-of-core merge, and what a merge in memory may take; the rank of merged LoRA adapters
    (None: the sum of the experts')."""

    chunk: int
    memory: int
    lora_rank: int | None = None


def merge_models(
    plan: MergeRecipe, inputs: Opened, folder: Path, limits: Limits, allow_missing: bool
) -> tuple[dict[str, Any], list[str]]:
    """Merges what the recipe names into safetensors files in `folder` (which exists).

    Returns:
        The report, as `merge` makes it, with "left_as_in_base" and "siblings" where they apply; and notes.
    """
    opened = _inputs(plan, inputs)
    notes = _checked(plan, opened)
    copied = merge_inputs.common_tensors(opened.named, opened.donor, allow_missing)
    method = registry.find(plan.merge_method)
    options = registry.resolve(method, plan.parameters, list(opened.experts))
    merging = Merging(method, options, _dtype(plan.dtype))
    units = out_of_core.in_units(opened, merging, copied)
    if all(unit.options is None for unit in units):
        raise InputError(f"{inputs.donor.path} has no floating-point tensor in common with the others")
    report: dict[str, Any] = {}
    likeness = _siblings(opened, [name for unit in units if unit.options is not None for name in unit.names])
    if likeness:
        report["siblings"] = likeness
    specs = out_of_core.specs_of_result(opened, merging.dtype)
    with _writer(folder, inputs, opened, specs, limits) as writer:
        if any(method.scope_at(unit.options) == "model" for unit in units if unit.options is not None):
            found = _in_memory(opened, merging, units, writer, limits.memory)
        else:
            largest = max(spec.nbytes for spec in opened.donor.specs.values())
            budget = (len(opened.experts) + 2) * max(limits.chunk, largest)
            found = out_of_core.stream(opened, merging, units, writer, budget)
    if isinstance(writer, lora.AdapterWriter):
        report["lora"] = {"rank": writer.rank, "norm_kept": writer.kept}
    notes += folders.copy_small_files(inputs.donor.path, folder, plan.dtype)
    report |= _report(merging, opened, found)
    if copied:
        report["left_as_in_base"] = sorted(copied)
        notes.append(f"{len(copied)} tensors are not in all models in one shape and are left as in "
                     f"{'the base' if opened.base is opened.donor else opened.donor.path}: {', '.join(copied[:3])}"
                     f"{', ...' if len(copied) > 3 else ''}")
        say(f"note: {notes[-1]}")
    return report, notes


def _writer(
    folder: Path, inputs: Opened, opened: Inputs, specs: Mapping[str, Spec], limits: Limits
) -> tensors.ShardedWriter | lora.AdapterWriter:
    if not isinstance(opened.donor, lora.Adapter):
        return tensors.ShardedWriter(folder, _shards(opened.donor, specs), {"format": "pt"})
    rank = limits.lora_rank or sum(expert.rank for expert in opened.experts.values())
    return lora.AdapterWriter(folder, opened.donor, rank)


def _inputs(plan: MergeRecipe, inputs: Opened) -> Inputs:
    experts = {name: one.checkpoint for name, one in inputs.experts.items()}
    measured_from = plan.base_model if plan.base_model in BASES else "file" if inputs.base else "none"
    return Inputs(experts, inputs.base.checkpoint if inputs.base else None, measured_from, inputs.donor.checkpoint)


def _checked(plan: MergeRecipe, inputs: Inputs) -> list[str]:
    """Notes on the inputs; InputError where they are no models that can be merged by this recipe."""
    for who, checkpoint in inputs.named.items():
        for name, spec in checkpoint.specs.items():
            if jnp.issubdtype(spec.dtype, jnp.floating) and spec.dtype.itemsize < 2:
                raise InputError(f"{who}: {name!r} is {spec.dtype}, a quantised model; merge one of 16 bits or more")
    blocks = settings.block_count(list(inputs.donor.specs))
    if plan.blocks is not None and plan.blocks != blocks:
        raise InputError(f"the recipe's slice has {plan.blocks} layers and the model {blocks}; cutting layers out of "
                         "models is not supported")
    note = merge_inputs.dtypes_note(inputs.named, inputs.donor)
    if note:
        say(f"note: {note}")
    return [note] if note else []


def _siblings(inputs: Inputs, merged: list[str]) -> dict[str, Any] | None:
    """The same-initialisation test on the first matrix inside a block, for experts that nothing vouches for."""
    if inputs.measured_from == "file" or len(inputs.experts) < 2 or isinstance(inputs.donor, lora.Adapter):
        return None
    depths = settings.relative_depths(merged)
    inside = [name for name in merged if settings.in_block(name) and len(inputs.donor.specs[name].shape) == 2]
    if not inside:
        return None
    first = min(inside, key=lambda name: (depths[name], inputs.donor.position(name)))
    return siblings.compare({who: one.read(first) for who, one in inputs.experts.items()}) | {"tensor": first}


def _in_memory(inputs: Inputs, merging: Merging, units: list, writer: out_of_core.Sink, limit: int) -> Found:
    """All tensors at once, for methods that need that."""
    merged = [name for unit in units if unit.options is not None for name in unit.names]
    entries = sum(int(np.prod(inputs.donor.specs[name].shape, dtype=int)) for name in merged)
    need = 4 * entries * 2 * (len(inputs.experts) + 2)
    if need > limit:
        raise InputError(f"merge method {merging.method.name!r} must see all tensors of the model together, which "
                         f"takes about {need / 1e9:.3g} GB here; --max-memory allows {limit / 1e9:.3g} GB")
    say(f"note: {merging.method.name} sees all tensors together: merging in memory")

    def tree(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        read = {name: checkpoint.read(name) for name in merged}
        wide = {name: tensor.astype(np.promote_types(tensor.dtype, np.float32)) for name, tensor in read.items()}
        return {name: out_of_core.as_matrix(tensor) for name, tensor in wide.items()}

    experts = {name: tree(checkpoint) for name, checkpoint in inputs.experts.items()}
    base = tree(inputs.base) if inputs.base else None
    if inputs.measured_from == "mean":
        base = {name: sum(one[name] for one in experts.values()) / len(experts) for name in merged}
    elif inputs.measured_from == "zero":
        base = {name: np.zeros_like(leaf) for name, leaf in next(iter(experts.values())).items()}
    result = merge(base, experts, merging.method.name, diagnose="full", **merging.options)
    specs = out_of_core.specs_of_result(inputs, merging.dtype)
    for name in merged:
        writer.write(name, np.asarray(result.params[name]).reshape(specs[name].shape).astype(specs[name].dtype))
    copies = [unit for unit in units if unit.options is None]
    out_of_core.stream(inputs, merging, copies, writer, limit)
    return Found(result.report["layers"], result.report["options"], result.report["exceptions"], {})


def _report(merging: Merging, inputs: Inputs, found: Found) -> dict[str, Any]:
    """What `merge` reports in brief, from the inner products that were taken on the way."""
    layers: dict[str, dict[str, Any]] = {}
    for name, products in found.products.items():
        if len(inputs.donor.specs[name].shape) < 2:
            continue
        bias = found.products.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
        total = products if bias is None else products + bias
        norms = np.sqrt(np.diagonal(total))
        cosines = total / np.maximum(norms[:, None] * norms, np.finfo(np.float32).tiny)
        layers[name.removesuffix(".weight")] = {
            "update_norms": dict(zip(inputs.experts, norms.tolist())), "cosines": cosines.tolist()}
    for label, facts in diagnostics.plain({"layers": found.layers})["layers"].items():
        layers[label] = layers.get(label, {}) | facts
    return {
        "method": merging.method.name,
        "options": {**merging.options, **found.options} if not any(map(settings.differs, merging.options.values()))
        else dict(merging.options),
        "experts": list(inputs.experts),
        "layers": layers,
        "exceptions": found.exceptions,
    }


def _dtype(word: str | None) -> np.dtype | None:
    return None if word is None else np.dtype(jnp.dtype(word))


def _shards(donor: Checkpoint, specs: Mapping[str, Spec]) -> dict[str, dict[str, Spec]]:
    """The donor's files where it has several (and they do not grow), else one, or as many as its size asks for."""
    held = donor.files
    grown = tensors.sizes(specs.values()) > tensors.sizes(donor.specs.values())
    if len(held) > 1 and not grown and all(file.endswith(".safetensors") for file in held):
        return {file: {name: specs[name] for name in names} for file, names in held.items()}
    return tensors.sharded(specs, _SHARD, "adapter_model" if lora.is_adapter(donor) else "model")
