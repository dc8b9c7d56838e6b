"""`pivotjax prepare`: a corpus of any format as one that is fast to read shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pivotjax import config as configs
from pivotjax.data.assets import cache_folder
from pivotjax.data.corpora import CorpusConfig, arrayrecord, open_corpus
from pivotjax.data.decode import BAD_LIMIT


@dataclass(frozen=True)
class PrepareConfig:
    """Writes a corpus as ArrayRecord: `pivotjax prepare --corpus.format webdataset --corpus.path 'cc12m/*.tar' --out D`

    Pictures stay as they are stored; samples that cannot be read are left out and counted. After an interruption the
    same command keeps the files of records that are finished; a TFDS dataset begins anew."""

    corpus: CorpusConfig
    """What to read."""
    out: Path
    """Folder to write; nothing may be there yet (tfds: the folder that datasets are in)."""
    into: Literal["arrayrecord", "tfds"] = "arrayrecord"
    """Our own records, or the TFDS dataset captioned_images."""
    bad_limit: float = BAD_LIMIT
    """Share of samples (of each file of 10,000 records; of a TFDS dataset) that may be unreadable."""
    cache: Path | None = None
    """Where indexes are kept (default: $PIVOTJAX_CACHE or ~/.cache/pivotjax)."""

    def __post_init__(self) -> None:
        configs.check_least(self, bad_limit=0)


def main(args: Sequence[str]) -> None:
    """Command line."""
    default = PrepareConfig(CorpusConfig(tyro.MISSING, tyro.MISSING), tyro.MISSING)
    run(configs.overridden(default, args, "pivotjax prepare"))


def run(config: PrepareConfig) -> Path:
    """Prepares the corpus; returns the folder that `CorpusConfig(config.into, folder)` reads."""
    corpus = open_corpus(config.corpus, cache_folder(config.cache))
    if config.into == "tfds":
        from pivotjax.data import tfds_builder

        folder = tfds_builder.prepare(corpus, config.out, config.bad_limit)
    else:
        folder = config.out
        arrayrecord.write(folder, corpus, bad_limit=config.bad_limit)
    print(f"wrote {folder}")
    return folder
