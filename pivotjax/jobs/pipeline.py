"""`pivotjax pipeline RECIPE`: trains K experts, merges them where they were trained, evaluates and exports, in one run.

The trained projectors stay on their devices between training and merging: a data-free merge is one program over the
mesh, whose input is the training state with its expert axis spread as it was. (Merges that see calibration data read
it on the host, so the experts come there first; nothing passes through the disk.) Every process runs the same program;
the first one writes.
"""

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
from pivotjax.data.sources import source
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

_W0, _EXPERT = "w0", "expert:"  # rows of the report that are no merges
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
    """Name -> `method: NAME` and the method's options; `calibrated: true` lets it see calibration data. The names are
    folders below `merges/` and rows of the report, whose `w0` and `expert:...` are taken."""
    export: str = "pivot"
    """Name of the merge that goes to `export/`."""
    unseen: tuple[str, ...] = ()
    """Packaged domains for evaluation only."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self):
        if self.joint:
            raise InputError("joint trains one projector, and there would be nothing to merge; leave it out")
        experts = self.data.named
        if len(experts) == 1:
            raise InputError(f"there is one domain only ({experts[0]}), and nothing to merge; use `pivotjax pretrain`")
        for name, merge_of in self.merges.items():
            if not isinstance(merge_of.get("method"), str):
                raise InputError(f"merges.{name} needs `method: NAME`; `pivotjax methods` lists them")
            _check(name, experts, **merge_of)
        if self.export not in self.merges:
            raise InputError(f"export {self.export!r} is none of the merges: {', '.join(self.merges)}")
        for name in self.unseen:
            source(name)


def _check(name: str, experts: Sequence[str], /, method: str, calibrated: bool = False, **options: Any) -> None:
    """InputError for what would fail after training (`experts`: their names, where the recipe alone tells them)."""
    if name == _W0 or name.startswith(_EXPERT) or Path(name).parts != (name,) or name == "..":
        raise InputError(f"merges: {name!r} cannot be a merge's name; it must be good for a folder, and {_W0} and "
                         f"{_EXPERT}... are taken")
    chosen = registry.find(method)
    registry.resolve(chosen, options, experts)
    if "calibration" in chosen.needs and not calibrated:
        raise InputError(f"merges.{name}: {method} needs calibration data; add `calibrated: true`")


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(PipelineConfig, args, "pivotjax pipeline"))


def run(config: PipelineConfig) -> Path:
    """All stages; returns the path of report.html. A run that ended early goes on where its training was."""
    calibrated = any(merge_of.get("calibrated") for merge_of in config.merges.values())
    with pretrain.trained(config, ("test", "calibration") if calibrated else ("test",)) as trained:
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
        if jax.process_index() == 0:
            _export(config, merges[config.export], base, experts)
        page = _evaluated(config, trained, base, experts, merges)
    say(f"report: {page}\nmerged projector for PyTorch: {config.out / 'export'}")
    return page


def _merged(
    config: PipelineConfig,
    trained: pretrain.Trained,
    experts: Mapping[str, store.Projector],
    /,
    method: str,
    calibrated: bool = False,
    **options: Any,
) -> Merge:
    """One merge of the experts that are alive; every process has it whole."""
    mesh = trained.layout.mesh
    if calibrated:
        sources = [[trained.domains[name].samples("calibration")] for name in experts]
        data = calibration.of_experts(trained.frozen, sources, config.calibration, _spread(mesh))
        params = {name: one.params for name, one in experts.items()}
        return merge_experts(trained.w0, params, method, calibration=data, **options)
    rows = [trained.names.index(name) for name in experts]
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
        arrays, told["rest"] = diagnostics.parted(result.report)
        return result.params, arrays

    merged, arrays = jax.jit(program, out_shardings=everywhere)(jax.tree.map(np.asarray, w0), params)
    return Merge(jax.device_get(merged), diagnostics.plain(diagnostics.joined(arrays, told["rest"])))


def _evaluated(
    config: PipelineConfig,
    trained: pretrain.Trained,
    base: store.Projector,
    experts: Mapping[str, store.Projector],
    merges: Mapping[str, Merge],
) -> Path:
    """Measures W0, the experts and the merges on every domain's test split, all devices sharing the work."""
    params = {_W0: base.params} | {f"{_EXPERT}{name}": one.params for name, one in experts.items()}
    params |= {name: one.params for name, one in merges.items()}
    unseen = [name for name in config.unseen if name not in trained.domains]
    domains = trained.domains | {name: trained.load_domain(name) for name in unseen}
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
    """Rows of test items over the devices that rows of training batches are spread over, and those of the experts; a
    process makes the rows of its own devices alone."""
    axes = ("expert", *parallel.ROWS)
    spread, everywhere = NamedSharding(mesh, P(axes)), NamedSharding(mesh, P())

    def put(array: np.ndarray, numbers: np.ndarray) -> jax.Array:
        shape = (*numbers.shape, *array.shape[1:])
        return jax.make_array_from_callback(shape, spread, lambda index: array[numbers[index[0]]])

    def copy(tree: Any) -> Any:
        return parallel.put(tree, jax.tree.map(lambda _: everywhere, tree))

    return Spread(int(np.prod([mesh.shape[axis] for axis in axes])), put, copy, hosts.fetch)


def _export(
    config: PipelineConfig, result: Merge, base: store.Projector, experts: Mapping[str, store.Projector]
) -> None:
    """The chosen merge for PyTorch."""
    info = merge.info_of(result, config.export, base, experts)
    torch_bridge.save_torch(config.out / "export" / "mm_projector.safetensors", result.params, info)
    files.write_json(config.out / "export" / "mm_projector.json", info)
