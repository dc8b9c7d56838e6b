"""`pivotjax scenario RECIPE`: a corpus split into heterogeneous domains, each into train, calibration and test."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pivotjax import config as configs
from pivotjax import files
from pivotjax.data import assets
from pivotjax.data.corpora import CorpusConfig, open_corpus
from pivotjax.data.decode import BAD_LIMIT, listed
from pivotjax.data.domains import check_names
from pivotjax.data.scenarios import SPLITTERS, DomainsConfig, columns, duplicates, embeddings, folder, manifest, page
from pivotjax.data.scenarios import splits as splitting
from pivotjax.data.scenarios.base import OUT, Request
from pivotjax.data.scenarios.duplicates import DuplicatesConfig
from pivotjax.data.scenarios.pool import Pool
from pivotjax.data.scenarios.splits import SplitsConfig
from pivotjax.errors import InputError
from pivotjax.jobs import assemble, output
from pivotjax.progress import say
from pivotjax.training import hosts
from pivotjax.training.hosts import HostsConfig

_LARGE = 0.01  # share of the samples above which one group of near-duplicates is worth a word


@dataclass(frozen=True)
class ScenarioConfig:
    """Splits corpora into domains. The recipe names the corpora (`corpora: {NAME: {format: ..., path: ...}}`);
    `--corpora.NAME.path` and so on change them."""

    out: Path
    """Folder of the scenario: index files, manifest.json, sheet.html."""
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    """Name -> where its samples are."""
    domains: DomainsConfig = field(default_factory=DomainsConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    bad_limit: float = BAD_LIMIT
    """Share of bad samples in a block of 16,384 above which the run stops."""
    seed: int = 0
    """Seed of all that is random."""
    workers: int = 0
    """Threads that read and decode; 0: one a core."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes that share the reading; all have to see the cache."""
    cache: Path | None = None
    """Folder for downloads, indices and embeddings (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""

    def __post_init__(self) -> None:
        configs.check_least(self, bad_limit=0)


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(ScenarioConfig, args, "pivotjax scenario"))


def run(config: ScenarioConfig) -> Path:
    """Writes the scenario into `config.out`, whole or not at all, and returns that.

    On several hosts each reads its share of the corpora; the first clusters and writes.
    """
    if not config.corpora:
        raise InputError("the recipe names no corpora; add `corpora: {NAME: {format: ..., path: ...}}`")
    with hosts.joined(config.hosts):
        return _run(config)


def _run(config: ScenarioConfig) -> Path:
    cache = assets.cache_folder(config.cache)
    with hosts.cache_filled_once(cache):
        pool = Pool({name: open_corpus(corpus, cache) for name, corpus in config.corpora.items()})
    there = jax.process_index() == 0 and _is_there(config, pool)  # the others may not see `out`
    if hosts.gather(np.asarray(there))[0]:
        say(f"scenario: {config.out} (was there)")
        return config.out
    splitter = SPLITTERS[config.domains.by]
    wanted = [*splitter.columns(config.domains.options), *duplicates.columns(config.duplicates)]
    if splitter.embeds:
        wanted.append(embeddings.column(config.domains.clustering, lambda name: assemble.weights(name, cache)))
    stored = columns.scan(pool, wanted, cache / "scenarios", config.workers, config.bad_limit)
    if jax.process_index() == 0:
        _split(config, pool, stored)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("pivotjax scenario: written")
    say(f"scenario: {config.out}")
    return config.out


def _is_there(config: ScenarioConfig, pool: Pool) -> bool:
    """Whether this very scenario is in `out`; InputError where anything else is."""
    out = config.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / folder.MANIFEST).is_file():
        raise InputError(f"{out} holds other files; give another --out")
    output.check(out, config)
    corpora = files.read_json(out / folder.MANIFEST)["corpora"]
    for name, corpus in pool.corpora.items():
        if corpora[name]["identity"] != corpus.identity:
            raise InputError(f"{out} was made of another {name} than is there now; give another --out, or remove it")
    return True


def _split(config: ScenarioConfig, pool: Pool, stored: dict[str, columns.Stored]) -> None:
    """From what is known of every sample to the folder."""
    keys, reasons = stored["keys"].map(), columns.reasons(stored)
    good = reasons == columns.GOOD
    bad = Counter(columns.bad(reasons))
    if not good.any():
        raise InputError(f"none of {len(pool)} samples can be used ({listed(bad.items())}); check the corpora")
    if bad:
        say(f"scenario: {bad.total():,} of {len(pool):,} samples left out: {listed(bad.items())}")
    options = config.domains
    request = Request(pool, stored, keys, good, options.count, config.seed, options.clustering)
    assigned = SPLITTERS[options.by].assign(options.options, request)
    check_names(assigned.names)
    groups = duplicates.groups(stored, good, config.duplicates)
    indices = splitting.indices(assigned, splitting.by_group(groups, keys, config.splits, config.seed))
    splitting.check(indices, config.splits)
    _say_largest(groups, good)
    for corpus in pool.corpora.values():
        bad.update(corpus.lost)
    taken = int(np.sum(assigned.domains != OUT))
    about = {
        "format": folder.FORMAT,
        "seed": config.seed,
        "recipe": _recipe(config),
        "corpora": {
            name: {"config": configs.resolved(config.corpora[name]), "identity": corpus.identity,
                   "samples": len(corpus)}
            for name, corpus in pool.corpora.items()
        },
        "samples": {"in domains": taken, "in no domain": int(good.sum()) - taken, "bad": dict(bad)},
        "groups": manifest.groups(groups[good]),
        "facts": assigned.facts,
    }  # fmt: skip
    _write(config, pool, about, indices, keys, groups)


def _write(config: ScenarioConfig, pool: Pool, about: dict[str, Any], indices, keys, groups) -> None:
    """The folder, with what has to be read of the corpora again: words and examples."""
    order = {name: manifest.shuffled(of["train"], keys, config.seed) for name, of in indices.items()}
    shown = {name: manifest.shown(pool, samples) for name, samples in order.items()}
    with files.atomic_path(config.out) as temporary:
        temporary.mkdir()
        written = folder.write_indices(temporary, indices)
        about["domains"] = manifest.domains(pool, indices, written, order, shown)
        files.write_json(temporary / folder.MANIFEST, about)
        sheet = page.render(about, shown, manifest.largest(pool, groups))
        files.write_bytes(temporary / folder.SHEET, sheet.encode())
        files.write_bytes(temporary / "config.yaml", configs.to_yaml(config).encode())


def _recipe(config: ScenarioConfig) -> dict[str, Any]:
    """What decides the scenario: not where it lies, nor how fast it was made."""
    left_out = ("out", "cache", "workers", "hosts", "bad_limit")
    return {name: value for name, value in configs.resolved(config).items() if name not in left_out}


def _say_largest(groups: np.ndarray, good: np.ndarray) -> None:
    """A group that holds much of a corpus makes the splits lopsided: chains of near-duplicates, or labels."""
    largest, count = int(np.bincount(groups[good]).max()), int(good.sum())
    if largest > max(_LARGE * count, 100):
        say(
            f"one group of near-duplicates has {largest:,} of {count:,} samples, all in one split; look at the sheet, "
            "and raise duplicates.similarity, lower duplicates.radius or set duplicates.common if they are not"
        )
