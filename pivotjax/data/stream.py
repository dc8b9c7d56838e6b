"""An expert's samples for ever: shuffled anew each epoch, mixed where there are several domains, addressed by place.

What stands at a place depends on the seed, the domain's name and the place alone, never on what was read before: any
process can read any part of the stream, and go on from anywhere.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, Protocol, TypedDict

import grain
import numpy as np

from pivotjax.data.captions import Captioner
from pivotjax.data.decode import BadSample, listed
from pivotjax.errors import InputError

TOO_LONG, CONVERTED = "caption too long", "picture made RGB"
_CANDIDATES = 200  # tried for one place of the stream, before its domain counts as unreadable


class Sample(TypedDict):
    """One captioned image: the picture, uint8 [S, S, 3], or the frozen encoder's features of it, [V, C]."""

    image: NotRequired[np.ndarray]
    features: NotRequired[np.ndarray]
    converted: NotRequired[bool]  # the picture was not RGB before
    caption: str
    concept: str
    key: str


class Samples(Protocol):
    """Random access to a domain's samples; picklable, and read by several threads at once."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; BadSample where it cannot be used."""
        ...

    def key(self, index: int) -> str:
        """Its name."""
        ...


class Drawn(NamedTuple):
    """A sample of the stream: its number among the samples of all domains, and its caption's tokens."""

    id: int
    sample: Sample
    caption: list[int]


@dataclass(frozen=True)
class Stream:
    """An endless order of the samples of one or more domains.

    Fields:
        domains: where samples come from.
        places: [place] -> (domain's number, index in it), as `shuffled` and `mixed` make it.
        seed: of the order and of what replaces bad samples.
        first: number of the first domain's first sample among all of the expert's.
    """

    domains: tuple[Samples, ...]
    places: grain.MapDataset
    seed: int
    first: int = 0

    def draw(self, place: int, captioner: Captioner, counts: Counter[str]) -> Drawn:
        """What stands at `place`. Bad samples give way to others of their domain, by hash, and are counted by reason.

        InputError where the domain has hardly anything that can be used.
        """
        number, index = self.places[place]
        domain = self.domains[number]
        for attempt in range(_CANDIDATES):
            if attempt:
                index = _hash(f"replace:{self.seed}:{domain.name}:{place}:{attempt}") % len(domain)
            try:
                sample = domain[index]
            except BadSample as bad:
                counts[bad.reason] += 1
                continue
            caption = captioner.caption_ids(sample["caption"])
            if len(caption) <= captioner.max_caption:
                counts[CONVERTED] += sample.get("converted", False)
                return Drawn(self.first + sum(map(len, self.domains[:number])) + index, sample, caption)
            counts[TOO_LONG] += 1
        reasons = listed(counts.most_common())
        raise InputError(f"domain {domain.name}: {_CANDIDATES} samples in a row cannot be used ({reasons}); look at it")


def shuffled(domain: Samples, seed: int, first: int = 0) -> Stream:
    """The stream of one domain; `first` numbers its first sample."""
    return Stream((domain,), _order(0, domain, seed), seed, first)


def mixed(domains: Sequence[Samples], weights: Sequence[float], seed: int) -> Stream:
    """The stream of several domains: up to every place their shares are as close to `weights` as they can be."""
    orders = [_order(number, domain, seed) for number, domain in enumerate(domains)]
    return Stream(tuple(domains), grain.MapDataset.mix(orders, weights), seed)


def _order(number: int, domain: Samples, seed: int) -> grain.MapDataset:
    """The domain's samples for ever, as (number, index)."""
    indices = grain.MapDataset.range(len(domain)).shuffle(seed=_hash(f"stream:{seed}:{domain.name}") >> 32)
    return indices.repeat().map(_Numbered(number))


@dataclass(frozen=True)
class _Numbered:
    number: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, int(index)


def _hash(text: str) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
