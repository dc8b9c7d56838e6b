"""`pivotjax prepare`: a corpus of any format as one that is fast to read shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pivotjax import config as configs
from pivotjax.data.assets import cache_folder
from pivotjax.data.corpora import CorpusConfig, arrayrecord, open_corpus
from pivotjax.errors import InputError


@dataclass(frozen=True)
class PrepareConfig:
    """Writes a corpus as ArrayRecord: `pivotjax prepare --corpus.format webdataset --corpus.path 'cc12m/*.tar' --out D`

    Pictures stay as they are stored; samples that cannot be read are left out and counted."""

    corpus: CorpusConfig
    """What to read."""
    out: Path
    """Folder to write; nothing may be there yet (tfds: the folder that datasets are in)."""
    into: Literal["arrayrecord", "tfds"] = "arrayrecord"
    """Our own records, or the TFDS dataset captioned_images."""
    cache: Path | None = None
    """Where indexes are kept (default: $PIVOTJAX_CACHE or ~/.cache/pivotjax)."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    default = PrepareConfig(CorpusConfig(tyro.MISSING, tyro.MISSING), tyro.MISSING)
    run(configs.overridden(default, args, "pivotjax prepare"))


def run(config: PrepareConfig) -> Path:
    """Prepares the corpus; returns the folder that `CorpusConfig(config.into, folder)` reads."""
    corpus = open_corpus(config.corpus, cache_folder(config.cache))
    if config.into == "tfds":
        from pivotjax.data import tfds_builder

        folder = tfds_builder.prepare(corpus, config.out)
    else:
        if config.out.exists():
            raise InputError(f"{config.out} exists already; give another name, or remove it")
        folder = config.out
        arrayrecord.write(folder, corpus)
    print(f"wrote {folder}")
    return folder
