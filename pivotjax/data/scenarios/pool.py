"""The corpora of a scenario, one after the other."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pivotjax.data.corpora import Corpus
from pivotjax.data.sources.base import Item


@dataclass(frozen=True)
class Pool:
    """Random access to the concatenation of several corpora, in the order of the mapping. Itself a corpus."""

    corpora: Mapping[str, Corpus]

    @cached_property
    def ends(self) -> np.ndarray:
        """int64: where each corpus ends."""
        return np.cumsum([len(corpus) for corpus in self.corpora.values()], dtype=np.int64)

    @property
    def identity(self) -> str:
        """Of the corpora and their order; their names do not matter."""
        return hashlib.sha256(" ".join(corpus.identity for corpus in self.corpora.values()).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def number(self, index):
        """Which of the corpora an index (or each of an array of them) is in."""
        return np.searchsorted(self.ends, index, side="right")

    def _place(self, index: int) -> tuple[Corpus, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside the {len(self)} samples")
        number = int(self.number(index))
        start = int(self.ends[number - 1]) if number else 0
        return list(self.corpora.values())[number], int(index) - start

    def __getitem__(self, index: int) -> Item:
        """Sample `index`; raises BadSample as its corpus does."""
        corpus, place = self._place(index)
        return corpus[place]

    def caption(self, index: int) -> str:
        """The caption alone; raises BadSample."""
        corpus, place = self._place(index)
        return corpus.caption(place)
