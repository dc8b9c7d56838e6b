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
    """Compiles a recipe's training step for a TPU slice that is not here. All options of `pretrain` apply but
    `parallel`, which is jit."""

    tpu: Path
    """The slice: a file of tpu_configs/."""
    experts: int = 0
    """Experts (0: one a domain; 4 where the recipe's scenario is not there yet)."""
    caption_tokens: float = 0.0
    """Mean tokens of a caption, its end included, for the share of padding (0: not known)."""
    json: str | None = None
    """Write everything as JSON to this file; `-`: to the standard output, instead of the table."""
    save: Path | None = None
    """Keep the compiled step in this folder: a new one, or one that holds an earlier step."""
    sweep: bool = False
    """Try other meshes, recomputation and samples at once, and print the best that fits."""
    sweep_limit: int = 4
    """Compile at most so many of them, those first that a rough model finds fastest."""
    batches: tuple[int, ...] = ()
    """Samples of each expert in a step that a sweep tries (default: the recipe's)."""

    def __post_init__(self) -> None:
        configs.check_least(self, experts=0, caption_tokens=0, sweep_limit=1)
        if self.parallel == "pmap":
            raise InputError("parallel: pmap is compiled where it runs; for other devices compile knows jit alone")


def main(args: Sequence[str]) -> None:
    """Command line."""
    named = args and not args[0].startswith("-")
    run(configs.parse(CompileConfig, args, "pivotjax compile"), args[0] if named else "defaults")


def run(config: CompileConfig, recipe: str = "recipe") -> dict[str, Any]:
    """Compiles, prints the table or the JSON, and returns what is in it."""
    _check_targets(config)
    where = topology.load(config.tpu)
    where.devices()  # whether the compiler is here is said before anything else is looked for
    step = shapes.described(config.model, config.data, config.training, shapes.experts(config, config.experts))
    if config.sweep:
        tried = _sweep(config, step, where)
        best = min(tried, key=_worth)
    else:
        tried = [best := _way(config, step, where, config.mesh)]
    values = {"recipe": recipe, "flags": best.flags, **best.values}
    if config.sweep:
        values["sweep"] = [{"flags": way.flags, **way.values} for way in tried]
    _show(config, values, tried)
    if config.save is not None:
        _save(config.save, best, values, where)
    return values


def _check_targets(config: CompileConfig) -> None:
    """InputError where what takes minutes could not be written in the end."""
    if config.save is not None:
        ahead.check_target(config.save)
    if config.json not in (None, "-"):
        path = Path(config.json)
        if path.is_dir():
            raise InputError(f"--json {path} is a folder; give a file")
        files.output_folder(path.absolute().parent)


class _Way(NamedTuple):
    """A way to run the step, and what came of it."""

    mesh: MeshConfig
    flags: str
    values: dict[str, Any]
    done: Compiled


def _way(config: CompileConfig, step: Described, where: Slice, given: MeshConfig) -> _Way:
    mesh = parallel.make_mesh(given, step.work.experts, step.work.samples, where.devices())
    say(f"compiling for {where.accelerator_type} (minutes for a large model)")
    done = ahead.compiled(step, mesh, where.hbm_bytes, where.xla_flags)
    values = report.report(step, where, mesh, done, config.caption_tokens)
    sizes = MeshConfig(**mesh.shape)
    return _Way(sizes, estimate.flags(sizes, step.training), values, done)


def _sweep(config: CompileConfig, step: Described, where: Slice) -> list[_Way]:
    """The ways that a rough model finds fastest, compiled until enough of them are."""
    found = estimate.candidates(step, where, config.batches)
    if not found:
        raise InputError(f"no mesh of {where.chips} chips takes this recipe; change training.batch, or take more chips")
    say(f"{len(found)} ways could fit; compiling the {min(len(found), config.sweep_limit)} that should be fastest")
    tried = []
    with Bar(min(len(found), config.sweep_limit), "sweep", "compile") as bar:
        for one in found[: config.sweep_limit]:
            work, flags = step.work._replace(samples=one.samples), estimate.flags(one.mesh, one.training)
            try:
                tried.append(_way(config, replace(step, work=work, training=one.training), where, one.mesh))
            except InputError as error:
                say(f"left out: {flags}: {error}")
            bar.update(1, flags)
    if not tried:
        raise InputError(f"none of {min(len(found), config.sweep_limit)} ways can be compiled; raise --sweep-limit")
    return tried


def _worth(way: _Way) -> tuple[bool, float]:
    """Smaller is better: what fits first, then the estimated time of a sample."""
    line = way.values["roofline"]
    return not way.values["memory"]["fits"], -line["samples_per_second"] if line else 0.0


def _save(folder: Path, best: _Way, values: dict[str, Any], where: Slice) -> None:
    if not best.done.memory.fits:
        say(f"the step does not fit, so nothing is saved in {folder}")
        return
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
        fits = values["memory"]["fits"]
        best = "best:" if fits else f"none of the {len(tried)} tried fits; raise --sweep-limit. The first of them:"
        print(report.ways([(way.mesh, way.values) for way in tried]) + f"\n\n{best}")
    print(report.table(values))
