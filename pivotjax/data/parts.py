"""Some samples of a corpus, drawn by a seed: how a corpus without splits of its own gets them, and limits are kept."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import grain
import numpy as np

from pivotjax.data.corpora import Corpus
from pivotjax.data.domains import Split
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError


@dataclass(frozen=True)
class Part:
    """What stands at `places` when `seed` shuffles the corpus, in the corpus' own order; a corpus itself.

    In that order because a pass over a corpus is fast only in its own; what trains on a part shuffles it anyway.
    """

    corpus: Corpus
    seed: int
    places: range

    @cached_property
    def _listed(self) -> np.ndarray:
        """int64, ascending: the samples that are in it; or, where those are most of the corpus, of each of the others
        how many of them stand before it."""
        order = grain.MapDataset.range(len(self.corpus)).shuffle(seed=self.seed)
        rest = (*range(self.places.start), *range(self.places.stop, len(order))) if self._is_most else self.places
        listed = np.sort(np.array([order[place] for place in rest], np.int64))
        return listed - np.arange(len(listed)) if self._is_most else listed

    @property
    def _is_most(self) -> bool:
        return 2 * len(self.places) > len(self.corpus)

    @property
    def identity(self) -> str:
        """Of the corpus, the seed and the places."""
        facts = f"{self.corpus.identity} {self.seed} {self.places.start} {self.places.stop} ascending"
        return hashlib.sha256(facts.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        return self.corpus[self._index(index)]

    def caption(self, index: int) -> str:
        """The caption alone."""
        return self.corpus.caption(self._index(index))

    def _index(self, index: int) -> int:
        index = range(len(self))[index]
        if not self._is_most:
            return int(self._listed[index])
        return index + int(np.searchsorted(self._listed, index, side="right"))


def limited(corpus: Corpus, limit: int | None, seed: int) -> Corpus:
    """At most so many samples of a corpus, drawn by the seed (None: all, in its own order)."""
    return corpus if limit is None or len(corpus) <= limit else Part(corpus, seed, range(limit))


def split(name: str, corpus: Corpus, limits: dict[Split, int | None], seed: int) -> dict[Split, Corpus]:
    """Test, calibration and training samples of a corpus, drawn by the seed; training takes what the others leave.

    InputError where they leave nothing.
    """
    test, calibration = limits["test"] or 0, limits["calibration"] or 0
    held_out = test + calibration
    if len(corpus) <= held_out:
        raise InputError(
            f"domain {name} has {len(corpus)} samples, data.test and data.calibration together take {held_out} of "
            "them; lower those"
        )
    end = len(corpus) if limits["train"] is None else min(len(corpus), held_out + limits["train"])
    stretches = {"train": range(held_out, end), "calibration": range(test, held_out), "test": range(test)}
    return {part: Part(corpus, seed, places) for part, places in stretches.items()}
