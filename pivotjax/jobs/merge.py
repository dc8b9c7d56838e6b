"""`pivotjax merge RECIPE`: merges trained projectors, tells what it did, writes the result for JAX and PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.data import assets
from pivotjax.errors import InputError
from pivotjax.jobs import assemble, calibration, output
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.merging import Merge, merge, recipe, tuning
from pivotjax.merging.calibration import Calibration
from pivotjax.merging.recipe import MergeRecipe
from pivotjax.models import projector
from pivotjax.progress import say


@dataclass(frozen=True)
class MergeConfig:
    """Merges projectors by a recipe in mergekit's vocabulary: `models`, `base_model`, `merge_method`, `parameters`,
    `dtype`. Any of these may be overridden too: `--merge-method ties --parameters.density 0.5`.
    `pivotjax methods` lists methods and parameters."""

    out: Path
    """Folder for the merged projector and the merge's report."""
    calibration: CalibrationConfig | None = None
    """Calibration pairs (of each expert's own domains) that the method may use; absent: merge data-free."""
    tune: bool = False
    """Choose the scale on the calibration captions; needs calibration."""
    allow_different_init: bool = False
    """Merge experts that did not start from one W0."""
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    config, plan = parse(args)
    run(config, plan)


def parse(args: Sequence[str]) -> tuple[MergeConfig, MergeRecipe]:
    """`RECIPE.yaml` and overrides -> what the job does, and what is merged how."""
    where = args[0] if args and not args[0].startswith("-") else None
    values = configs.read_yaml(Path(where)) if where else {}
    own = {field.name for field in fields(MergeConfig)}
    recipe_overrides, rest = _recipe_overrides(list(args[1:] if where else args))
    for (key, *inner), value in recipe_overrides:
        values |= {key: {**(values.get(key) or {}), inner[0]: value} if inner else value}
    default = configs.from_dict(MergeConfig, {k: v for k, v in values.items() if k in own}, where or "pivotjax merge")
    config = configs.overridden(default, rest, "pivotjax merge")
    written = {key: value for key, value in values.items() if key not in own}
    if config.calibration is not None:
        written["calibration"] = configs.resolved(config.calibration)
    return config, recipe.parse(yaml.safe_dump(written), where=where or "pivotjax merge")


def _recipe_overrides(args: list[str]) -> tuple[list[tuple[list[str], Any]], list[str]]:
    """Splits `--parameters.KEY VALUE`, `--merge-method M`, `--base-model B` and `--dtype D` from the job's options."""
    found, rest = [], []
    while args:
        arg = args.pop(0)
        flag, _, attached = arg.partition("=")
        path = flag.removeprefix("--").replace("-", "_").split(".")
        if path[0] in ("parameters", "merge_method", "base_model", "dtype") and flag.startswith("--"):
            if not attached and not args:
                raise InputError(f"{flag} has no value; give one after it")
            found.append((path[:2], _value(flag, attached or args.pop(0))))
        else:
            rest.append(arg)
    return found, rest


def _value(flag: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{flag}: {text!r} is not valid YAML; give a number, a word or a list like [1, 2]") from error


def run(config: MergeConfig, plan: MergeRecipe) -> Merge:
    """Merges, tunes if asked, writes `out/projector`, `mm_projector.safetensors` and `merge_report.json`."""
    experts = {name: assemble.load_projector(Path(path)) for name, path in plan.models}
    base = assemble.load_projector(Path(plan.base_model)) if plan.base_model else None
    check_siblings(base, experts, config.allow_different_init)
    data = None
    if config.calibration is not None:
        data = _calibration(experts, config.calibration, assets.cache_folder(config.cache))
    if config.tune and (data is None or base is None):
        raise InputError(
            "tune chooses the scale on calibration captions; give base_model and `calibration: {captions: 24}`"
        )
    result = merge_projectors(base, experts, plan.merge_method, plan.parameters, data)
    output.claim(config.out, configs.resolved(config) | {"recipe": configs.resolved(plan)})
    if config.tune:
        result = tune(base, result, data)
    if plan.dtype:
        result = result._replace(params=jax.tree.map(lambda a: jnp.asarray(a, plan.dtype), result.params))
    save(config.out, result, f"merge of {', '.join(experts)}", base, experts)
    say(f"merged projector: {config.out / 'projector'}")
    return result


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
    some = next(iter(experts.values())).info
    sources = ({"base": base} if base else {}) | dict(experts)
    info = {key: some[key] for key in ("init_id", "backbone", "config") if key in some} | {
        "name": name,
        "versions": assemble.versions(),
        "domains": sorted({domain for expert in experts.values() for domain in expert.info.get("domains", [])}),
        "merge": {"method": result.report["method"], "options": result.report["options"]},
        "merged_from": {key: projector.fingerprint(one.params) for key, one in sources.items()},
    }
    store.save_projector(out / "projector", result.params, info)
    torch_bridge.save_torch(out / "mm_projector.safetensors", result.params, info)
    files.write_json(out / "merge_report.json", result.report)


def _calibration(experts: Mapping[str, store.Projector], config: CalibrationConfig, cache: Path) -> Calibration:
    """Each expert's own domains' calibration pairs, as its checkpoint names them."""
    first = next(iter(experts))
    frozen = assemble.frozen_of(experts[first].info, cache, first)
    _, data = assemble.config_of(experts[first].info, first)
    for name, expert in experts.items():
        if not expert.info.get("domains"):
            raise InputError(f"{name} does not say which domains it was trained on; merge it without calibration")
    names = {domain for expert in experts.values() for domain in expert.info["domains"]}
    sources = {name: assemble.load_domain(name, data, frozen, cache).splits["calibration"] for name in sorted(names)}
    return calibration.of_experts(frozen, [[sources[d] for d in e.info["domains"]] for e in experts.values()], config)
