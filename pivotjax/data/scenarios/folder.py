"""A scenario on disk: index files, a manifest, a contact sheet; and how it is read again."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from pivotjax import config as configs
from pivotjax import files
from pivotjax.data import assets
from pivotjax.data.corpora import Corpus, CorpusConfig, open_corpus
from pivotjax.data.domains import SPLITS, Split
from pivotjax.data.scenarios import arrays
from pivotjax.data.scenarios.pool import Pool
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError

FORMAT = 1
MANIFEST, SHEET = "manifest.json", "sheet.html"


@dataclass(frozen=True)
class Subset:
    """The samples of one domain and split: a corpus itself, which travels to other processes without its indices."""

    pool: Pool
    path: Path
    identity: str  # SHA-256 of the indices and of what they point into

    @cached_property
    def indices(self) -> Int64[np.ndarray, " N"]:
        """Indices into the pool, ascending; memory-mapped."""
        return np.load(self.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.pool[int(self.indices[index])]

    def caption(self, index: int) -> str:
        return self.pool.caption(int(self.indices[index]))

    def __getstate__(self) -> dict:
        return {"pool": self.pool, "path": self.path, "identity": self.identity}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Scenario:
    """A corpus split into domains, each into train, calibration and test."""

    path: Path
    manifest: dict[str, Any]
    pool: Pool
    domains: dict[str, dict[Split, Subset]]


def load(path: Path, cache: Path | None = None, corpora: Mapping[str, CorpusConfig] | None = None) -> Scenario:
    """Opens a scenario's folder and its corpora.

    Args:
        path: what `pivotjax scenario` wrote.
        cache: where the corpora keep their indices (default: `assets.cache_folder()`).
        corpora: where they are, by the scenario's names, if not where they were when it was made.

    Raises:
        InputError: there is no scenario, it is damaged, or a corpus is not the one that it was made of; or it has no
            corpus of a name in `corpora`.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} holds no scenario (no {MANIFEST}); make one with `pivotjax scenario RECIPE`")
    manifest = files.read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has scenario format {manifest.get('format')!r}, not {FORMAT}; make it again")
    moved = corpora or {}
    for name in moved.keys() - manifest["corpora"].keys():
        raise InputError(f"{path} was made of no corpus {name}; its corpora are {', '.join(manifest['corpora'])}")
    pool = Pool({name: _corpus(path, name, about, cache, moved) for name, about in manifest["corpora"].items()})
    domains = {
        name: {split: _subset(path, name, split, facts, pool) for split, facts in domain["splits"].items()}
        for name, domain in manifest["domains"].items()
    }
    return Scenario(path, manifest, pool, domains)


def write_indices(folder: Path, domains: Mapping[str, Mapping[Split, Int64[np.ndarray, " N"]]]) -> dict[str, dict]:
    """Writes `<domain>.<split>.npy`; returns count and SHA-256 of each by domain and split, for the manifest."""
    facts: dict[str, dict] = {}
    for name, splits in domains.items():
        facts[name] = {}
        for split in SPLITS:
            file = _file(folder, name, split)
            arrays.save(file, np.asarray(splits[split], "<i8"))
            facts[name][split] = {"count": len(splits[split]), "sha256": files.sha256(file)}
    return facts


def _file(folder: Path, domain: str, split: Split) -> Path:
    return folder / f"{domain}.{split}.npy"


def _corpus(
    path: Path, name: str, about: dict[str, Any], cache: Path | None, moved: Mapping[str, CorpusConfig]
) -> Corpus:
    config = moved.get(name) or configs.from_dict(CorpusConfig, about["config"], where=str(path / MANIFEST))
    corpus = open_corpus(config, assets.cache_folder(cache))
    if corpus.identity != about["identity"]:
        what = "is another at" if name in moved else "has changed since at"
        raise InputError(f"the corpus {name} of {path} {what} {config.path}; restore it, or make the scenario again")
    return corpus


def _subset(path: Path, name: str, split: Split, facts: dict[str, Any], pool: Pool) -> Subset:
    file = _file(path, name, split)
    if not file.is_file() or files.sha256(file) != facts["sha256"]:
        raise InputError(f"{file} is missing or damaged; make the scenario again")
    identity = hashlib.sha256(f"{pool.identity} {facts['sha256']}".encode()).hexdigest()
    return Subset(pool, file, identity)
