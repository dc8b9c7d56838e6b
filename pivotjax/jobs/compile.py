"""`pivotjax compile RECIPE --tpu tpu_configs/v5e-256.yaml`: what the TPU's compiler says about a training step.

The step, its shardings and its batch are those that `pivotjax pretrain` runs; weights are shapes only, taken from the
models' folders, or from what is published of them. Exit status 0 also where the step does not fit (`memory.fits` says
it); 2 for wrong input only.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pivotjax import config as configs
from pivotjax import files
from pivotjax.errors import InputError
from pivotjax.jobs import shapes
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.progress import Bar, say
from pivotjax.tpu import compile as ahead
from pivotjax.tpu import estimate, report, topology
from pivotjax.tpu.compile import Compiled, Described
from pivotjax.tpu.topology import Slice
from pivotjax.training import parallel
from pivotjax.training.parallel import MeshConfig


@dataclass(frozen=True, kw_only=True)
class CompileConfig(PretrainConfig):
    """Compiles a recipe's training step for a TPU slice that is not here. All options of `pretrain` apply."""

    tpu: Path
    """The slice: a file of tpu_configs/. Its mesh is taken where the recipe names none."""
    experts: int = 0
    """Experts (0: one a domain; 4 where the recipe's scenario is not there yet)."""
    caption_tokens: float = 0.0
    """Mean tokens of a caption, its end included, for the share of padding (0: not known)."""
    json: str | None = None
    """Write everything as JSON to this file; `-`: to the standard output, instead of the table."""
    save: Path | None = None
    """Keep the compiled step in this folder."""
    sweep: bool = False
    """Try other meshes, recomputation and samples at once, and print the best that fits."""
    sweep_limit: int = 4
    """Compile at most so many of them, those first that a rough model finds fastest."""
    batches: tuple[int, ...] = ()
    """Samples of each expert in a step that a sweep tries (default: the recipe's)."""

    def __post_init__(self) -> None:
        configs.check_least(self, experts=0, caption_tokens=0, sweep_limit=1)


def main(args: Sequence[str]) -> None:
    """Command line."""
    named = args and not args[0].startswith("-")
    run(configs.parse(CompileConfig, args, "pivotjax compile"), args[0] if named else "defaults")


def run(config: CompileConfig, recipe: str = "recipe") -> dict[str, Any]:
    """Compiles, prints the table or the JSON, and returns what is in it."""
    where = topology.load(config.tpu)
    where.devices()  # whether the compiler is here is said before anything else is looked for
    step = shapes.described(config.model, config.data, config.training, shapes.experts(config, config.experts))
    if config.sweep:
        tried = _sweep(config, step, where)
        best = min(tried, key=_worth)
    else:
        mesh = where.mesh if config.mesh == MeshConfig() else config.mesh
        tried = [best := _way(config, step, where, mesh)]
    values = {"recipe": recipe, "flags": best.flags, **best.values}
    if config.sweep:
        values["sweep"] = [{"flags": way.flags, **way.values} for way in tried]
    if config.save is not None:
        _save(config.save, best, values, where)
    _show(config, values, tried)
    return values


class _Way(NamedTuple):
    """A way to run the step, and what came of it."""

    mesh: MeshConfig
    flags: str
    values: dict[str, Any]
    done: Compiled


def _way(config: CompileConfig, step: Described, where: Slice, mesh: MeshConfig) -> _Way:
    devices = parallel.make_mesh(mesh, step.work.experts, step.work.samples, where.devices())
    say(f"compiling for {where.accelerator_type} (minutes for a large model)")
    done = ahead.compiled(step, devices, where.hbm_bytes, where.xla_flags)
    values = report.report(step, where, devices, done, config.caption_tokens)
    return _Way(mesh, estimate.flags(mesh, step.training), values, done)


def _sweep(config: CompileConfig, step: Described, where: Slice) -> list[_Way]:
    """The ways that a rough model finds fastest, compiled until enough of them are."""
    found = estimate.candidates(step, where, config.batches)
    if not found:
        raise InputError(f"no mesh of {where.chips} chips takes this recipe; change training.batch, or take more chips")
    say(f"{len(found)} ways could fit; compiling the {min(len(found), config.sweep_limit)} that should be fastest")
    tried = []
    with Bar(min(len(found), config.sweep_limit), "sweep", "compile") as bar:
        for one in found[: config.sweep_limit]:
            work = step.work._replace(samples=one.samples)
            tried.append(_way(config, replace(step, work=work, training=one.training), where, one.mesh))
            bar.update(1, tried[-1].flags)
    return tried


def _worth(way: _Way) -> tuple[bool, float]:
    """Smaller is better: what fits first, then the estimated time of a sample."""
    line = way.values["roofline"]
    return not way.values["memory"]["fits"], -line["samples_per_second"] if line else 0.0


def _save(folder: Path, best: _Way, values: dict[str, Any], where: Slice) -> None:
    if best.done.executable is None:
        raise InputError(f"nothing to save in {folder}: the step does not fit; {values['advice'][-1]}")
    ahead.save(folder, best.done.executable, where.devices(), values)
    say(f"compiled step: {folder}")


def _show(config: CompileConfig, values: dict[str, Any], tried: list[_Way]) -> None:
    if config.json == "-":
        json.dump(values, sys.stdout, indent=1)
        print()
        return
    if config.json is not None:
        files.write_json(Path(config.json), values)
    if config.sweep:
        print(report.ways([(way.mesh, way.values) for way in tried]) + "\n\nbest:")
    print(report.table(values))
