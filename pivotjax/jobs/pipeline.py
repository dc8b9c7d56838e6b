"""`pivotjax pipeline RECIPE`: trains K experts, merges them where they were trained, evaluates and exports, in one run.

The trained projectors stay on their devices between training and merging: a data-free merge is one program over the
mesh, whose input is the training state with its expert axis spread as it was. (Merges that see calibration data read
it on the host, so the experts come there first; nothing passes through the disk.) Every process runs the same program;
the first one writes.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.errors import InputError
from pivotjax.evaluation import report
from pivotjax.evaluation.runner import Spread
from pivotjax.jobs import calibration, evaluate, merge, pretrain
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.jobs.evaluate import MeasureConfig
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.merging import Merge, Stacked, diagnostics, registry
from pivotjax.merging import merge as merge_experts
from pivotjax.models import projector
from pivotjax.progress import say
from pivotjax.training import hosts, parallel

_MERGES = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties"},
    "pivot": {"method": "pivot"},
}


@dataclass(frozen=True)
class PipelineConfig(PretrainConfig):
    """Trains K experts, merges them on the devices where they were trained, evaluates all of it and exports one merge.

    Every recipe of `pivotjax pretrain` is one of `pivotjax pipeline`."""

    merges: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(_MERGES))
    """Name -> `method: NAME` and the method's options; `calibrated: true` lets it see calibration data."""
    export: str = "pivot"
    """Name of the merge that goes to `export/`."""
    unseen: tuple[str, ...] = ()
    """Domains for evaluation only."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self):
        if self.joint:
            raise InputError("joint trains one projector, and there would be nothing to merge; leave it out")
        for name, merge_of in self.merges.items():
            if not isinstance(merge_of.get("method"), str):
                raise InputError(f"merges.{name} needs `method: NAME`; `pivotjax methods` lists them")
            _check(name, **merge_of)
        if self.export not in self.merges:
            raise InputError(f"export {self.export!r} is none of the merges: {', '.join(self.merges)}")


def _check(name: str, method: str, calibrated: bool = False, **options: Any) -> None:
    """InputError for what would fail after training."""
    chosen = registry.find(method)
    registry.resolve(chosen, options)
    if "calibration" in chosen.needs and not calibrated:
        raise InputError(f"merges.{name}: {method} needs calibration data; add `calibrated: true`")


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(PipelineConfig, args, "pivotjax pipeline"))


def run(config: PipelineConfig) -> Path:
    """All stages; returns the path of report.html. A run that ended early goes on where its training was."""
    with pretrain.trained(config) as trained:
        pretrain.write(trained)
        experts = trained.experts()
        if len(experts) < 2:
            raise InputError(f"only {len(experts)} of {len(trained.names)} experts stayed finite; nothing to merge")
        base, merges = trained.base(), {}
        for name, merge_of in config.merges.items():
            say(f"merging: {name}")
            merges[name] = _merged(config, trained, experts, **merge_of)
            if jax.process_index() == 0:
                merge.save(config.out / "merges" / name, merges[name], name, base, experts)
        page = _evaluated(config, trained, base, experts, merges)
        if jax.process_index() == 0:
            _export(config, merges[config.export], base, experts)
    say(f"report: {page}\nmerged projector for PyTorch: {config.out / 'export'}")
    return page


def _merged(
    config: PipelineConfig,
    trained: pretrain.Trained,
    experts: Mapping[str, store.Projector],
    method: str,
    calibrated: bool = False,
    **options: Any,
) -> Merge:
    """One merge of the experts that are alive; its parameters are on the host."""
    if calibrated:
        sources = [[trained.domains[name].splits["calibration"]] for name in experts]
        data = calibration.of_experts(trained.frozen, sources, config.calibration)
        params = {name: one.params for name, one in experts.items()}
        return merge_experts(trained.w0, params, method, calibration=data, **options)
    rows, mesh = [trained.names.index(name) for name in experts], trained.layout.mesh
    return merged_on_devices(mesh, trained.w0, trained.state.params, trained.names, rows, method, options)


def merged_on_devices(
    mesh: jax.sharding.Mesh,
    w0: projector.Params,
    params: projector.Params,
    names: Sequence[str],
    rows: Sequence[int],
    method: str,
    options: Mapping[str, Any],
) -> Merge:
    """Merges stacked experts where they are, in one program over the mesh.

    Args:
        mesh: the devices that hold `params`.
        w0: what the experts started from, on the host.
        params: `[K, ...]` on every leaf, the expert axis spread over the mesh.
        names: of all K.
        rows: those that are merged.
        method, options: as in `pivotjax.merging.merge`.

    Returns the merge with its parameters and its report on the host, the same in every process.
    """
    everywhere, told = NamedSharding(mesh, P()), {}

    def program(w0, params):
        chosen = params if len(rows) == len(names) else jax.tree.map(lambda leaf: leaf[np.array(rows)], params)
        result = merge_experts(w0, Stacked(chosen, [names[row] for row in rows]), method, **options)
        leaves, told["tree"] = jax.tree.flatten(result.report, is_leaf=lambda leaf: leaf is None)
        told["plain"] = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)}
        return result.params, {str(i): leaf for i, leaf in enumerate(leaves) if i not in told["plain"]}

    merged, arrays = jax.jit(program, out_shardings=everywhere)(jax.tree.map(np.asarray, w0), params)
    arrays = jax.device_get(arrays)
    leaves = [told["plain"].get(i, arrays.get(str(i))) for i in range(told["tree"].num_leaves)]
    return Merge(jax.device_get(merged), diagnostics.plain(jax.tree.unflatten(told["tree"], leaves)))


def _evaluated(
    config: PipelineConfig,
    trained: pretrain.Trained,
    base: store.Projector,
    experts: Mapping[str, store.Projector],
    merges: Mapping[str, Merge],
) -> Path:
    """Measures W0, the experts and the merges on every domain's test split, all devices sharing the work."""
    params = {"w0": base.params} | {f"expert:{name}": one.params for name, one in experts.items()}
    params |= {name: one.params for name, one in merges.items()}
    domains = trained.domains | {name: trained.load_domain(name) for name in config.unseen}
    outcomes = evaluate.measure(trained.frozen, params, domains, config.measure, _spread(trained.layout.mesh))
    page = config.out / "report.html"
    if jax.process_index() == 0:
        evaluate.save_outcomes(config.out / "outcomes.npz", outcomes)
        found = evaluate.describe("Trained, merged and measured in one run", config, [config.seed]) | {
            "domains": evaluate.describe_domains(domains, list(trained.domains), outcomes),
            **evaluate.numbers(list(params), [outcomes], list(trained.domains), config.measure),
            "merges": {name: one.report for name, one in merges.items()},
        }
        page = report.write_report(found, config.out)
    return page


def _spread(mesh: jax.sharding.Mesh) -> Spread:
    """Rows of test items over the devices that rows of training batches are spread over, and those of the experts."""
    axes = ("expert", *parallel.ROWS)
    put = functools.partial(parallel.put, where=NamedSharding(mesh, P(axes)))
    return Spread(int(np.prod([mesh.shape[axis] for axis in axes])), put, hosts.fetch)


def _export(
    config: PipelineConfig, result: Merge, base: store.Projector, experts: Mapping[str, store.Projector]
) -> None:
    """The chosen merge for PyTorch."""
    info = merge.info_of(result, config.export, base, experts)
    torch_bridge.save_torch(config.out / "export" / "mm_projector.safetensors", result.params, info)
    files.write_json(config.out / "export" / "mm_projector.json", info)
