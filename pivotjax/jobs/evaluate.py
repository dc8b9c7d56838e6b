"""`pivotjax evaluate RECIPE`: caption loss and retrieval of projectors on every domain's test split, with a report."""

import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pivotjax import config as configs
from pivotjax import files
from pivotjax.data import assets
from pivotjax.data.sources import SOURCES
from pivotjax.errors import InputError
from pivotjax.evaluation import metrics, report, runner
from pivotjax.evaluation.metrics import Outcome
from pivotjax.evaluation.runner import HERE, Spread
from pivotjax.evaluation.tasks import TestSet
from pivotjax.jobs import assemble, output
from pivotjax.jobs.merge import check_siblings
from pivotjax.models import projector
from pivotjax.progress import say
from pivotjax.versions import versions


@dataclass(frozen=True)
class MeasureConfig:
    """How projectors are measured."""

    choices: int = 8
    """Captions that an image's own is to be found among (domains with a closed set of captions: all of them)."""
    control_items: int = 24
    """Items of each domain that are also shown with another item's image."""
    resamples: int = 2000
    """Bootstrap resamples behind the 95 % intervals."""
    seed: int = 0
    """Seed of the wrong captions and of the bootstrap."""

    def __post_init__(self):
        configs.check_least(self, choices=2, control_items=0, resamples=1, seed=0)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures projectors on the test split of every domain that one of them was trained on, and on further ones."""

    out: Path
    """Folder for report.html, report.json and figures."""
    projectors: dict[str, Path] = field(default_factory=dict)
    """Name -> checkpoint (Orbax folder or .safetensors)."""
    unseen: tuple[str, ...] = ("outlines",)
    """Domains that no expert was trained on."""
    items: int | None = None
    """Test samples of each domain (default: as many as the projectors' own data config says)."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(EvaluateConfig, args, "pivotjax evaluate"))


def run(config: EvaluateConfig) -> Path:
    """Measures and writes the report; returns the path of report.html."""
    if not config.projectors:
        raise InputError("no projectors to evaluate; give a recipe with `projectors: {name: CHECKPOINT}`")
    loaded = {name: assemble.load_projector(path) for name, path in config.projectors.items()}
    check_siblings(None, loaded, allow_different_init=True)
    output.claim(config.out, config)
    cache = assets.cache_folder(config.cache)
    name, first = next(iter(loaded.items()))
    _, data = assemble.config_of(first.info, name)
    frozen = assemble.frozen_of(first.info, cache, name)
    if config.items is not None:
        data = configs.from_dict(assemble.DataConfig, configs.resolved(data) | {"test": config.items}, name)
    trained = sorted({domain for one in loaded.values() for domain in one.info.get("domains", [])})
    unseen = [domain for domain in config.unseen if domain not in trained]
    domains = {domain: assemble.load_domain(domain, data, frozen, cache) for domain in [*trained, *unseen]}
    outcome = measure(frozen, {name: one.params for name, one in loaded.items()}, domains, config.measure)
    found = describe("Projectors measured", config, [data.split_seed]) | {
        "domains": describe_domains(domains, trained, outcome),
        **numbers(list(loaded), [outcome], trained, config.measure),
    }
    page = report.write_report(found, config.out)
    say(f"report: {page}")
    return page


def measure(
    frozen: assemble.Frozen,
    params: Mapping[str, projector.Params],
    domains: Mapping[str, assemble.Domain],
    config: MeasureConfig,
    spread: Spread = HERE,
) -> dict[str, Outcome]:
    """Every projector on every domain's test split, by the devices of `spread`."""
    return runner.evaluate(
        frozen.language,
        frozen.language.params,
        jax.tree.map(lambda *leaves: np.stack(leaves), *params.values()),  # on the host: no device needs all of them
        {name: test_set(domain) for name, domain in domains.items()},
        frozen.captioner,
        choices=config.choices,
        control_items=config.control_items,
        seed=config.seed,
        spread=spread,
    )


def test_set(domain: assemble.Domain) -> TestSet:
    """A domain's test split; closed domains bring all captions that occur in them."""
    answers = None
    if domain.name in SOURCES and SOURCES[domain.name].closed_captions:
        train = domain.samples("train")
        answers = sorted({train[i]["caption"] for i in range(len(train))})
    test = domain.samples("test")
    return TestSet.of((test[i] for i in range(len(test))), answers)


def numbers(
    names: Sequence[str], outcomes: Sequence[Mapping[str, Outcome]], trained: Sequence[str], config: MeasureConfig
) -> dict[str, Any]:
    """The report's `projectors` and `comparisons`; one outcome a seed."""
    keywords = {"resamples": config.resamples, "seed": config.seed}
    return {
        "projectors": metrics.summarise(names, outcomes, trained, **keywords),
        "comparisons": metrics.compare(names, outcomes, trained, **keywords),
    }


def describe(title: str, config: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """The report's head: when, how, with what, on what."""
    return {
        "title": title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["pivotjax", *sys.argv[1:]]),
        "machine": {"platform": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "versions": versions(),
        "config": configs.resolved(config),
        "seeds": list(seeds),
    }


def describe_domains(
    domains: Mapping[str, assemble.Domain], trained: Sequence[str], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """The report's `domains`: role, sizes, candidates in retrieval, licence and attribution."""
    return {
        name: {
            "role": "trained" if name in trained else "unseen",
            **{split: len(samples) for split, samples in domain.splits.items()},
            "choices": outcomes[name].choices,
            "licence": SOURCES[name].licence if name in SOURCES else "the corpus's own",
            "attribution": SOURCES[name].attribution if name in SOURCES else "",
            "dropped": domain.dropped,
        }
        for name, domain in domains.items()
    }


def save_outcomes(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Per-item numbers as .npz: `<domain>/<field>`."""

    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, **{f"{d}/{key}": value for d, outcome in outcomes.items() for key, value in outcome._asdict().items()}
        )


def load_outcomes(path: Path) -> dict[str, Outcome]:
    """Inverse of `save_outcomes`."""
    with np.load(path, allow_pickle=False) as saved:
        domains = list(dict.fromkeys(key.split("/")[0] for key in saved.files))
        return {d: Outcome(**{key: saved[f"{d}/{key}"] for key in Outcome._fields}) for d in domains}
