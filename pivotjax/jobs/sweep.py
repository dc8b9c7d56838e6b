"""`pivotjax sweep RECIPE --over OPTION=VALUES`: tunes the options of a merge on calibration data."""

import csv
import dataclasses
import datetime
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import store
from pivotjax.data import assets
from pivotjax.errors import InputError
from pivotjax.jobs import calibration, merge, merge_inputs, output, sweep_page
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.jobs.merge import MergeConfig
from pivotjax.merging import merge as merge_params
from pivotjax.merging import recipe as recipes
from pivotjax.merging import registry, tuning
from pivotjax.merging.calibration import Calibration
from pivotjax.merging.recipe import MergeRecipe
from pivotjax.merging.tuning import Trial
from pivotjax.progress import say
from pivotjax.versions import versions


@dataclass(frozen=True)
class SweepConfig:
    """Merges projectors at every combination of some options' values, and measures the caption loss of each on
    calibration data:

    `pivotjax sweep merge/ties.yaml --over lambda=0.1:1.5:0.1 --over density=0.1,0.2,0.5`

    What is merged is said as for `pivotjax merge`, by a recipe, its overrides, or the command line alone; all its
    options are understood. Written to the output folder: table (sweep.csv, sweep.json), plot (sweep.png, sweep.html)
    and the best recipe (recipe.yaml), which `pivotjax merge` takes."""

    over: tuple[str, ...] = ()
    """OPTION=VALUES, for each option that is varied: values are listed (a,b,c), ranges (START:STOP:STEP, both ends
    included), or lists of both. Several --over: all combinations."""
    on: tuple[str, ...] = ()
    """Calibration data to measure on: a YAML file (a `calibration` section, alone or in a recipe), or KEY=VALUE ...:
    captions=24, domains=emoji,icons (default: all domains that the experts were trained on). Default: the recipe's
    `calibration`, which is also what the method itself may use; --on changes nothing about that."""
    out: Path | None = None
    """Folder for the results (default: the recipe's `out` with -sweep after it)."""


@dataclass(frozen=True)
class MeasuredOn(CalibrationConfig):
    """What candidates are measured on: a calibration section that may name domains."""

    domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A sweep, described: the merge, the values of each varied option, and the data that decide."""

    out: Path
    config: MergeConfig
    plan: MergeRecipe
    axes: Mapping[str, Sequence[Any]]
    on: MeasuredOn


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(parse(args))


def parse(args: Sequence[str]) -> Sweep:
    """The command line as a checked sweep; InputError says what is wrong with it, `--help` prints and exits 0."""
    if {"-h", "--help"} & set(args):
        configs.overridden(SweepConfig(), ["--help"], "pivotjax sweep")
    own, rest = _own_options(args)
    over, on, out = (own[name] for name in ("--over", "--on", "--out"))
    if len(out) > 1:
        raise InputError(f"--out takes one folder, not {len(out)}")
    config, plan = merge.parse([*rest, *(["--out", *out] if out else [])])
    if not over:
        raise InputError("nothing to vary: give --over OPTION=VALUES, for instance --over lambda=0.1:1.5:0.1")
    folder = config.out if out else config.out.with_name(f"{config.out.name}-sweep")
    return Sweep(folder, config, plan, _axes(over, plan), _measured_on(on, config))


def run(plan: Sweep) -> Trial:
    """Measures all candidates and writes the output folder; returns the best one."""
    with merge_inputs.open_all(plan.plan) as inputs:
        if not inputs.are_projectors:
            raise InputError("sweep measures projectors; whole models have no calibration data here")
        experts = {name: one.projector for name, one in inputs.experts.items()}
        base = inputs.base.projector if inputs.base else None
        merge.check_siblings(base, experts, plan.config.allow_different_init)
        output.claim(plan.out, _described(plan))
        used, measured = _calibrations(plan, experts)
        params = {name: expert.params for name, expert in experts.items()}
        origin = merge.origin(plan.plan.base_model, base.params if base else None, params)
    method, fixed = plan.plan.merge_method, plan.plan.parameters

    def merge_at(options: dict[str, Any]) -> Any:
        return merge_params(origin, params, method, calibration=used, diagnose="nothing", **{**fixed, **options}).params

    merges = math.prod(len(values) for option, values in plan.axes.items() if option != "scale")
    candidates = math.prod(map(len, plan.axes.values()))
    say(f"{candidates} candidates from {merges} merge{'s' if merges > 1 else ''}")
    trials = tuning.sweep(origin, merge_at, plan.axes, measured)
    chosen = tuning.best(trials)
    alone = ({"base": base.params} if base else {}) | params
    references = dict(zip(alone, tuning.losses(list(alone.values()), measured)))
    _write(plan, trials, chosen, references)
    best = ", ".join(f"{option} = {value}" for option, value in chosen.options.items())
    say(f"best: {best}, loss {chosen.loss:.4f}; table and plot: {plan.out / 'sweep.html'}\n"
        f"to merge with it: pivotjax merge {plan.out / 'recipe.yaml'}")
    return chosen


def _own_options(args: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Splits `--over`, `--on` and `--out`, each with all its values, from what `pivotjax merge` understands."""
    own: dict[str, list[str]] = {"--over": [], "--on": [], "--out": []}
    rest: list[str] = []
    taking = rest
    for arg in args:
        flag, cut, value = arg.partition("=")
        if arg.startswith("--"):
            taking = own.get(flag, rest)
        if taking is rest:
            rest.append(arg)
        elif flag not in own:
            taking.append(arg)
        elif cut:
            taking.append(value)
    return own, rest


def _axes(over: Sequence[str], plan: MergeRecipe) -> dict[str, list[Any]]:
    """`OPTION=VALUES` ... -> checked values by option, under the method's own names."""
    method = registry.find(plan.merge_method)
    experts = [name for name, _ in plan.models]
    axes: dict[str, list[Any]] = {}
    for text in over:
        word, cut, values = text.partition("=")
        option = registry.ALIASES.get(word, word)
        if not cut or not word:
            raise InputError(f"--over {text}: write OPTION=VALUES, for instance lambda=0.1:1.5:0.1 or density=.1,.2")
        if option in axes:
            raise InputError(f"--over varies {option} twice; give all its values at once")
        axes[option] = list(dict.fromkeys(value for item in values.split(",") for value in _values(item, text)))
        for value in axes[option]:
            registry.resolve(method, {**plan.parameters, option: value}, experts)
    if "scale" in axes and plan.base_model is None:
        raise InputError("scale is a factor on what was learnt since the base: give base_model, or leave scale out")
    return axes


def _values(item: str, text: str) -> list[Any]:
    """One word or number, or the numbers of `START:STOP:STEP`."""
    if ":" not in item:
        try:
            value = yaml.safe_load(item)
        except yaml.YAMLError as error:
            raise InputError(f"--over {text}: {item!r} is neither a number nor a word") from error
        if not isinstance(value, (str, int, float)) and item.strip() not in ("null", "~"):
            raise InputError(f"--over {text}: {item!r} is neither a number nor a word")
        return [value]
    try:
        start, stop, step = map(float, item.split(":"))
        count = math.floor((stop - start) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"--over {text}: a range is START:STOP:STEP, three numbers, the step not 0") from error
    if count < 1:
        raise InputError(f"--over {text}: the range {item} is empty")
    # Sums of steps as people write them: .3, not .30000000000000004.
    values = [float(f"{start + i * step:.12g}") for i in range(count)]
    whole = all(part.lstrip("+-").isdigit() for part in item.split(":"))
    return [int(value) for value in values] if whole else values


def _measured_on(on: Sequence[str], config: MergeConfig) -> MeasuredOn:
    """What `--on` says, or the recipe's own calibration."""
    if not on:
        if config.calibration is None:
            raise InputError("no calibration data to measure on: give --on captions=24, or a recipe with a "
                             "`calibration` section")
        return MeasuredOn(**dataclasses.asdict(config.calibration))
    if len(on) == 1 and "=" not in on[0]:
        values = configs.read_yaml(Path(on[0]))
        values = values.get("calibration", values)
        if not isinstance(values, Mapping):
            raise InputError(f"{on[0]}: calibration must be a mapping of keys to values, for instance `captions: 24`")
        return configs.from_dict(MeasuredOn, dict(values), on[0])
    values = {}
    for text in on:
        key, cut, value = text.partition("=")
        if not cut:
            raise InputError(f"--on {text}: give one YAML file, or KEY=VALUE ..., for instance captions=24")
        values[key] = value.split(",") if key == "domains" else yaml.safe_load(value)
    return configs.from_dict(MeasuredOn, values, "--on")


def _calibrations(
    plan: Sweep, experts: Mapping[str, store.Projector]
) -> tuple[Calibration | None, Calibration]:
    """What the method may use, and what candidates are measured on; the frozen models are loaded once."""
    for_method = plan.config.calibration is not None
    own = calibration.trained_on(experts) if for_method or not plan.on.domains else []
    measured = [plan.on.domains] if plan.on.domains else own
    frozen, sources = calibration.open_splits(experts, [*own, *measured], assets.cache_folder(plan.config.cache))

    def of(domains: Sequence[Sequence[str]], config: CalibrationConfig) -> Calibration:
        return calibration.of_experts(frozen, [[sources[name] for name in each] for each in domains], config)

    return of(own, plan.config.calibration) if for_method else None, of(measured, plan.on)


def _described(plan: Sweep) -> dict[str, Any]:
    """The sweep as plain values: the config that is saved, and the head of sweep.json."""
    return {
        "out": str(plan.out),
        "recipe": configs.resolved(recipes.written(plan.plan)),
        "over": {option: list(values) for option, values in plan.axes.items()},
        "on": configs.resolved(plan.on),
    }


def _write(plan: Sweep, trials: Sequence[Trial], chosen: Trial, references: Mapping[str, float]) -> None:
    """Table, plot and recipe."""
    found = _described(plan) | {
        "method": plan.plan.merge_method,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "trials": [trial._asdict() for trial in trials],
        "best": chosen._asdict(),
        "references": dict(references),
    }
    files.write_json(plan.out / "sweep.json", found)
    files.write_bytes(plan.out / "sweep.csv", _table(trials).encode())
    files.write_bytes(plan.out / "recipe.yaml", _best_recipe(plan, chosen, len(trials)).encode())
    sweep_page.write(plan.out, files.read_json(plan.out / "sweep.json"))


def _table(trials: Sequence[Trial]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*trials[0].options, "loss"])
    rows.writerows([*trial.options.values(), trial.loss if math.isfinite(trial.loss) else ""] for trial in trials)
    return text.getvalue()


def _best_recipe(plan: Sweep, chosen: Trial, candidates: int) -> str:
    """The merge at the best values, for `pivotjax merge`; headed by what it measured."""
    recipe, on = plan.plan, plan.on
    where = f"the calibration split of {', '.join(on.domains)}" if on.domains else "the experts' calibration splits"
    best = dataclasses.replace(recipe, parameters={**recipe.parameters, **chosen.options})
    values = {"out": str(plan.out / "merged")} | recipes.written(best)
    if plan.config.allow_different_init:
        values["allow_different_init"] = True
    head = f"# The best of {candidates} candidates: loss {chosen.loss:.4f} nats a token on {where}\n" \
           f"# ({on.captions} captions a domain). Test data say how good it really is.\n"
    return head + configs.to_yaml(values)
