"""`pivotjax merge`: merges projectors or whole models, tells what it did, writes the result for JAX and PyTorch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import folders, store, torch_bridge
from pivotjax.config import size
from pivotjax.data import assets
from pivotjax.errors import InputError
from pivotjax.jobs import (
    calibration,
    merge_args,
    merge_card,
    merge_inputs,
    merge_models,
    methods,
    output,
)
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.jobs.merge_inputs import Opened
from pivotjax.merging import Merge, merge, page, recipe, registry, siblings, tuning
from pivotjax.merging.calibration import Calibration
from pivotjax.merging.recipe import MergeRecipe
from pivotjax.models import projector
from pivotjax.progress import say
from pivotjax.versions import versions

_REPORT = "merge_report.json"


@dataclass(frozen=True)
class MergeConfig:
    """Merges projectors, LoRA adapters or whole models, by a mergekit-style recipe or by the command line alone:

    `pivotjax merge RECIPE.yaml --out DIR [--OPTION VALUE ...]`

    `pivotjax merge --method ties --base B --experts [NAME=]E1 E2 ... --out DIR --density 0.2`

    Inputs: projectors (Orbax, safetensors, `mm_projector.bin`), Hugging Face folders, LoRA adapters. `--base` is what
    the experts started from, or `mean` or `zero`. `--dtype` float32, bfloat16, float16 or float64. The method's
    options are flags: `pivotjax merge --method ties --help` lists them, `pivotjax methods` lists the methods."""

    out: Path
    """Folder for the result, its model card and the merge's report."""
    format: Literal["orbax", "safetensors", "bin"] | None = None
    """Of the result; default: the format of the base, else of the first expert."""
    calibration: CalibrationConfig | None = None
    """Calibration pairs (of each expert's own domains) that the method may use; absent: merge data-free."""
    tune: bool = False
    """Choose the scale on the calibration captions; needs calibration."""
    allow_different_init: bool = False
    """Merge experts that did not start from one W0."""
    allow_missing: bool = False
    """Merge the tensors that all models have in one shape; the rest stays as in the base (or the first expert)."""
    chunk: str = "256MB"
    """Whole models are merged out of core: memory for K + 2 chunks, or K + 2 of the largest tensor."""
    max_memory: str = "16GB"
    """A method that must see all tensors of a whole model at once is refused where that takes more."""
    lora: Literal["products", "factors"] = "products"
    """LoRA adapters (with base zero): merge the updates B A that they stand for, or the factors A and B as they are."""
    lora_rank: int | None = None
    """Rank of an adapter merged from products; default: the sum of the experts' ranks, which loses nothing of a linear
    merge. The report tells how much of each update the rank keeps."""
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""

    def __post_init__(self):
        if self.lora_rank is not None:
            configs.check_least(self, lora_rank=1)
        size(self.chunk), size(self.max_memory)
        if self.format == "bin":
            raise InputError("format bin is a torch pickle, which is not written here; choose safetensors, which torch "
                             "programs read as well (safetensors.torch.load_file)")


def main(args: Sequence[str]) -> None:
    """Command line."""
    if {"-h", "--help"} & set(args):
        name = merge_args.asked_method([arg for arg in args if arg not in ("-h", "--help")])
        if name is not None:
            registry.find(name)
            sys.stdout.write(methods.manual(name) + "\n\n")
    config, plan = parse(args)
    run(config, plan)


def parse(args: Sequence[str]) -> tuple[MergeConfig, MergeRecipe]:
    """`RECIPE.yaml` and overrides -> what the job does, and what is merged how."""
    where = args[0] if args and not args[0].startswith("-") else None
    written = configs.read_yaml(Path(where)) if where else {}
    own = {field.name for field in fields(MergeConfig)}
    values, rest = merge_args.split(list(args[1:] if where else args), written, own)
    default = configs.from_dict(MergeConfig, {k: v for k, v in values.items() if k in own}, where or "the options")
    config = configs.overridden(default, rest, "pivotjax merge")
    plan = {key: value for key, value in values.items() if key not in own}
    if config.calibration is not None:
        plan["calibration"] = configs.resolved(config.calibration)
    # A command line without a recipe speaks our language alone.
    defaults, job_keys = None if where else "pivotjax", bool(own & written.keys())
    return config, recipe.parse(yaml.safe_dump(plan), where or "the options", defaults, job_keys)


def run(config: MergeConfig, plan: MergeRecipe) -> dict[str, Any]:
    """Merges, and writes the output folder, which appears whole or not at all. Returns the report."""
    resolved = configs.resolved(config) | {"recipe": configs.resolved(plan)}
    _check_out(config.out, plan, resolved)
    for note in plan.notes:
        say(f"note: {note}")
    with merge_inputs.open_all(plan, config.lora == "factors") as inputs:
        whole = not inputs.are_projectors or (config.allow_missing and inputs.donor.checkpoint is not None)
        with files.atomic_path(config.out) as folder:
            folder.mkdir()
            report = (_merge_models if whole else _merge_projectors)(config, plan, inputs, folder)
            files.write_bytes(folder / "config.yaml", configs.to_yaml(resolved).encode())
            merge_card.write(folder, config.out.name, configs.resolved(recipe.written(plan)), report)
            page.write(folder, report | {"title": config.out.name, "recipe": configs.resolved(recipe.written(plan))})
            names = sorted({_REPORT, *(path.name for path in folder.iterdir())})
            files.write_json(folder / _REPORT, report | {"files": names})
    say(f"merged: {config.out}")
    return report


def _check_out(out: Path, plan: MergeRecipe, resolved: dict[str, Any]) -> None:
    """InputError if the folder cannot be written, is one of the models, or holds anything but this merge's output."""
    paths = [path for _, path in plan.models] + [path for path in (plan.base_model, plan.donor) if path]
    for path in paths:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} is or holds one of the models ({path}); give another --out")
    output.check(out, resolved)
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    report = out / _REPORT
    foreign = held - {"config.yaml"} - set(files.read_json(report).get("files", []) if report.is_file() else [])
    if foreign:
        raise InputError(f"{out} holds what no merge wrote ({sorted(foreign)[0]}); give another --out")
    absent = not out.exists()
    files.output_folder(out)
    if absent:
        out.rmdir()


def _merge_projectors(config: MergeConfig, plan: MergeRecipe, inputs: Opened, folder: Path) -> dict[str, Any]:
    """The merge in memory, of projectors; returns its report."""
    experts = {name: one.projector for name, one in inputs.experts.items()}
    base = inputs.base.projector if inputs.base else None
    check_siblings(base, experts, config.allow_different_init)
    data = None
    if config.calibration is not None:
        data = _calibration(experts, config.calibration, assets.cache_folder(config.cache))
    if config.tune and (data is None or base is None):
        raise InputError(
            "tune chooses the scale on calibration captions; give base_model and `calibration: {captions: 24}`"
        )
    params = {name: expert.params for name, expert in experts.items()}
    start = origin(plan.base_model, base.params if base else None, params)
    like = base.params if base else next(iter(params.values()))
    if plan.dtype:  # the result is rounded once
        start, params = _at_least(start, plan.dtype), _at_least(params, plan.dtype)
    result = merge(start, params, plan.merge_method, calibration=data, diagnose="full", **plan.parameters)
    if config.tune:
        result = tune(base, result, data)
    merged = jax.tree.map(lambda leaf, old: leaf.astype(plan.dtype or old.dtype), result.params, like)
    result, notes = result._replace(params=merged), list(plan.notes)
    report = result.report | _provenance(plan, inputs)
    seen = _first_layers(base, experts)
    if len(seen) > 1:
        report["siblings"] = siblings.compare(seen)
        notes += _warned(report["siblings"])
    format = config.format or inputs.donor.format
    if format == "bin":
        notes.append(_said("the result is written as safetensors, which torch programs read as well"))
        format = "safetensors"
    report["notes"] = notes
    if format == "orbax":
        save_projector(folder, result, _title(experts), base, experts)
    else:
        names = inputs.donor.checkpoint.specs if inputs.donor.checkpoint else None
        info = info_of(result, _title(experts), base, experts)
        torch_bridge.save_torch(folder / "mm_projector.safetensors", result.params, info, names)
        notes += folders.copy_small_files(inputs.donor.path, folder, plan.dtype)
    return report


def origin(word: str | None, base: Any, experts: Mapping[str, Any]) -> Any:
    """What updates are measured from: the base, or what stands in for one that nobody has."""
    if word == "mean":
        return jax.tree.map(lambda *leaves: sum(_wide(leaf) for leaf in leaves) / len(leaves), *experts.values())
    if word == "zero":
        return jax.tree.map(lambda leaf: jnp.zeros_like(_wide(leaf)), next(iter(experts.values())))
    return base


def _wide(leaf: Any) -> Any:
    return np.asarray(leaf, np.promote_types(leaf.dtype, np.float32))


def _at_least(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, jnp.promote_types(leaf.dtype, dtype)), params)


def _first_layers(base: store.Projector | None, experts: Mapping[str, store.Projector]) -> dict[str, np.ndarray]:
    """The first layers to be tested for a common start; none where the checkpoints vouch for it (equal `init_id`)."""
    all_of_them = ({merge_inputs.THE_BASE: base} if base else {}) | dict(experts)
    starts = {str(one.info.get("init_id")) for one in all_of_them.values()}
    if len(starts) == 1 and "None" not in starts:
        return {}
    return {name: np.vstack([_wide(one.params["linear_0"]["kernel"]), _wide(one.params["linear_0"]["bias"])[None]]).T
            for name, one in all_of_them.items()}


def _warned(found: Mapping[str, Any]) -> list[str]:
    """Says (and returns) what the same-initialisation test found wrong."""
    if found["alike"]:
        return []
    pair, facts = min(found["pairs"].items(), key=lambda item: item[1]["in_place"])
    return [_said(f"{pair.replace(', ', ' and ')} do not look as if they had one start: {facts['in_place']:.0%} of the "
                  "first layer's units match in place (of siblings nearly all do), so a merge mixes unrelated units")]


def _said(note: str) -> str:
    say(f"note: {note}")
    return note


def _provenance(plan: MergeRecipe, inputs: Opened) -> dict[str, Any]:
    """What every report says of where things come from."""
    return {
        "measured_from": plan.base_model or "nothing",
        "inputs": {name: one.provenance() for name, one in inputs.named.items()},
        "versions": versions(),
    }


def _title(experts: Mapping[str, Any]) -> str:
    return f"merge of {', '.join(experts)}"


def _merge_models(config: MergeConfig, plan: MergeRecipe, inputs: Opened, folder: Path) -> dict[str, Any]:
    """The merge of whole models, out of core where the method allows it; returns its report."""
    if plan.calibration is not None or config.tune:
        raise InputError("calibration and tune are for projectors; whole models are merged without data")
    if config.format == "orbax":
        raise InputError("format orbax is for projectors; whole models are written as safetensors")
    limits = merge_models.Limits(size(config.chunk), size(config.max_memory), config.lora_rank)
    report, notes = merge_models.merge_models(plan, inputs, folder, limits, config.allow_missing)
    if "siblings" in report:
        notes += _warned(report["siblings"])
    return report | _provenance(plan, inputs) | {"notes": [*plan.notes, *notes]}


def merge_projectors(
    base: store.Projector | None,
    experts: Mapping[str, store.Projector],
    method: str,
    options: Mapping[str, Any],
    data: Calibration | None,
) -> Merge:
    """One merge of projectors read from disk."""
    params = {name: expert.params for name, expert in experts.items()}
    return merge(base.params if base else None, params, method, calibration=data, **options)


def tune(base: store.Projector, result: Merge, data: Calibration) -> Merge:
    """The same merge at the scale with the lowest calibration loss; its report holds the curve."""
    options = result.report["options"]
    if "scale" not in options or not options["scale"]:
        raise InputError(f"merge method {result.report['method']!r} has no scale that could be tuned; leave out tune")
    at_one = jax.tree.map(lambda b, m: b + (m - b) / options["scale"], base.params, result.params)
    tuned = tuning.tune_scale(base.params, at_one, data)
    params = jax.tree.map(lambda b, m: b + tuned.best * (m - b), base.params, at_one)
    report = result.report | {
        "options": options | {"scale": tuned.best},
        "tuned": {"option": "scale"} | tuned._asdict(),
    }
    return Merge(params, report)


def check_siblings(
    base: store.Projector | None, experts: Mapping[str, store.Projector], allow_different_init: bool
) -> None:
    """Updates only mean something between projectors of one W0 and one pair of frozen models."""
    named = ({"the base": base} if base else {}) | dict(experts)
    for what, hint in (
        (
            "init_id",
            "they did not start from one W0 (hidden units do not match); --allow-different-init merges all the same",
        ),
        ("backbone", "they were trained between different frozen models and cannot be merged"),
    ):
        seen = {name: str(one.info[what]) for name, one in named.items() if what in one.info}
        if len(set(seen.values())) > 1 and not (what == "init_id" and allow_different_init):
            first, other = next(iter(seen)), next(name for name in seen if seen[name] != next(iter(seen.values())))
            raise InputError(f"{first} and {other} have different {what}: {hint}")


def save(
    out: Path, result: Merge, name: str, base: store.Projector | None, experts: Mapping[str, store.Projector]
) -> None:
    """The merged projector as Orbax checkpoint and torch safetensors, and its report."""
    save_projector(out, result, name, base, experts)
    files.write_json(out / _REPORT, result.report)


def save_projector(
    out: Path, result: Merge, name: str, base: store.Projector | None, experts: Mapping[str, store.Projector]
) -> None:
    """The merged projector as Orbax checkpoint and torch safetensors."""
    info = info_of(result, name, base, experts)
    store.save_projector(out / "projector", result.params, info)
    torch_bridge.save_torch(out / "mm_projector.safetensors", result.params, info)


def info_of(
    result: Merge, name: str, base: store.Projector | None, experts: Mapping[str, store.Projector]
) -> dict[str, Any]:
    """What travels with a merged projector."""
    some = next(iter(experts.values())).info
    sources = ({"base": base} if base else {}) | dict(experts)
    return {key: some[key] for key in ("init_id", "backbone", "config") if key in some} | {
        "name": name,
        "versions": versions(),
        "domains": sorted({domain for expert in experts.values() for domain in expert.info.get("domains", [])}),
        "merge": {"method": result.report["method"], "options": result.report["options"]},
        "merged_from": {key: projector.fingerprint(one.params) for key, one in sources.items()},
    }


def _calibration(experts: Mapping[str, store.Projector], config: CalibrationConfig, cache: Path) -> Calibration:
    """Each expert's own domains' calibration pairs, as its checkpoint names them."""
    own = calibration.trained_on(experts)
    frozen, sources = calibration.open_splits(experts, own, cache)
    return calibration.of_experts(frozen, [[sources[name] for name in domains] for domains in own], config)
