"""Where captioned pictures are read from at scale. A new format is one file here and one line in `FORMATS`."""

import difflib
from pathlib import Path

from pivotjax.data.corpora import arrayrecord, llava_json, packaged, parquet, tfds, webdataset
from pivotjax.data.corpora.base import Corpus, CorpusConfig, Format
from pivotjax.errors import InputError

__all__ = ["FORMATS", "Corpus", "CorpusConfig", "Format", "open_corpus"]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (webdataset, arrayrecord, tfds, llava_json, parquet, packaged)
}


def open_corpus(config: CorpusConfig, cache: Path) -> Corpus:
    """The corpus that `config` names. A format that needs an index builds it once, below `cache`.

    InputError (one line) where the corpus is missing or broken as a whole; a broken sample raises BadSample when read.
    """
    if config.format not in FORMATS:
        near = difflib.get_close_matches(config.format, FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown corpus format {config.format!r}; {hint}known: {', '.join(FORMATS)}")
    corpus = FORMATS[config.format].open(config, Path(cache))
    if not len(corpus):
        raise InputError(f"the corpus at {config.path} has no samples; check its path and format")
    return corpus
