"""Training batches: every expert's domains, shuffled for ever, the same whatever else is trained beside them."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt8

from pivotjax.data.captions import Captioner
from pivotjax.data.decode import BAD_LIMIT, REASONS, listed, too_many
from pivotjax.data.rows import Rows
from pivotjax.data.shared import Part
from pivotjax.data.stream import CONVERTED, TOO_LONG, Drawn, Samples, Stream, mixed, shuffled
from pivotjax.data.workers import Ahead
from pivotjax.errors import InputError
from pivotjax.progress import say

CUT = "caption cut to fit its row"
COUNTED = (*REASONS, TOO_LONG, CUT, CONVERTED)  # what `Batch.bad` counts, in this order
_WINDOW = 4096  # samples; what is bad among the newest of them counts by itself, however many were good before
_MANY = 200  # captions that are dropped before a word is said of it
HOST_KEYS = ("ids", "bad")  # of a batch: for the loop, never put on devices


class Batch(TypedDict, total=False):
    """What a training step takes: K experts, B rows each, I images a row (1 where rows are not packed), V visual tokens
    an image, rows of L tokens with T caption tokens to predict.

    A row's j-th IMAGE_TOKEN stands for the j-th of its I * V visual tokens. `targets[t]` is predicted by the hidden
    state at `places[t]`; `weights` is 1 at captions' tokens, their ends included, and 0 at padding. In packed rows
    `segments` numbers the samples (1, 2, ...; 0 at padding), a token sees only earlier tokens of its segment, and
    `positions` are those within the segment.
    """

    images: UInt8[np.ndarray, "K B I S S 3"]  # either the pictures ...
    features: Float[np.ndarray, "K B I V C"]  # ... or the frozen encoder's features of them
    tokens: Int32[np.ndarray, "K B L"]
    targets: Int32[np.ndarray, "K B T"]
    places: Int32[np.ndarray, "K B T"]
    weights: Float32[np.ndarray, "K B T"]
    segments: Int32[np.ndarray, "K B L"]
    positions: Int32[np.ndarray, "K B L"]
    ids: Int64[np.ndarray, "K B I"]  # number of the sample among those of all of its expert's domains
    bad: Int64[np.ndarray, " C"]  # what was met while making the batch, by `COUNTED`


class Share(NamedTuple):
    """What part of each batch `[K, B]` a process feeds."""

    experts: range
    rows: range


@dataclass(frozen=True)
class Feed:
    """Batches of K experts, addressed by step: batch `s` depends on the recipe, the seed, `s` and the share alone, so a
    run goes on from any step bitwise, on any number of processes and workers.

    A row holds `pack` samples, so that an expert has `rows = batch * domains / pack` of them: those of its first
    domain, then of the next; with `weights`, all of one mixed stream. A domain's stream depends on the seed and the
    domain's name alone: K experts together get the very samples that each would get by itself, and a smaller domain
    starts its next, newly shuffled epoch earlier.

    Fields:
        experts: each expert's domains, the same number for each.
        captioner: makes captions tokens.
        batch: samples of a domain in a step.
        seed: of the order.
        weights: shares of the domains by name, for experts with several; None: `batch` of each.
        pack: samples a row (I).
        row_tokens: length of packed rows (L); 0: room for the longest that can be.
        workers: processes that make batches; 0: threads of this one.
        bad_limit: share of samples that may be bad (`decode.too_many` says when it is certain that more are).
        share: the part of each batch that this process makes; None: all.

    InputError on experts without domains or with unequal numbers of them, and on numbers that do not fit together.
    """

    experts: Mapping[str, Sequence[Samples]]
    captioner: Captioner
    batch: int
    seed: int
    weights: Mapping[str, float] | None = None
    pack: int = 1
    row_tokens: int = 0
    workers: int = 0
    bad_limit: float = BAD_LIMIT
    share: Share | None = None

    def __post_init__(self) -> None:
        counts = {name: len(domains) for name, domains in self.experts.items()}
        if not counts or 0 in counts.values() or len(set(counts.values())) > 1:
            raise InputError(
                f"every expert needs the same number of domains, at least one; got {counts or 'no experts'}"
            )
        if self.batch < 1 or self.batch % self.pack:
            raise InputError(
                f"a batch of {self.batch} samples a domain cannot be packed in rows of {self.pack}; "
                "make training.batch a multiple of data.pack"
            )
        for name, domains in self.experts.items() if self.weights else ():
            unknown = {domain.name for domain in domains} ^ set(self.weights)
            if unknown or min(self.weights.values()) <= 0:
                raise InputError(f"data.weights needs a number above 0 for each domain of {name}; see {unknown or ''}")

    @property
    def names(self) -> tuple[str, ...]:
        """The experts."""
        return tuple(self.experts)

    @property
    def rows(self) -> int:
        """Rows of an expert in the whole batch (B)."""
        return self.batch // self.pack * len(next(iter(self.experts.values())))

    @property
    def layout(self) -> Rows:
        """How samples become rows: `layout.length` is L, `layout.targets` T."""
        return Rows(self.captioner, self.pack, self.row_tokens)

    def part(self, share: Share) -> "Feed":
        """The same feed for a process that makes this part of each batch."""
        return replace(self, share=share)

    def start(self, step: int) -> "Batches":
        """This process's part of batches `step`, `step + 1`, ...; `close()` it (or use `with`) to end its workers."""
        share = self.share or Share(range(len(self.experts)), range(self.rows))
        streams = [self._streams(self.experts[self.names[k]]) for k in share.experts]
        made = _Batches(streams, self.layout, self.rows, share.rows)
        return Batches(Ahead(made, step, self.workers), self.bad_limit)

    def keys(self, expert: str, ids: np.ndarray) -> list[str]:
        """The samples' names, from a batch's `ids` of that expert, row by row."""
        domains, ends = self.experts[expert], np.cumsum([len(domain) for domain in self.experts[expert]])
        numbers = np.searchsorted(ends, np.ravel(ids), side="right")
        firsts = ends - [len(domain) for domain in domains]
        return [domains[n].key(int(id_ - firsts[n])) for n, id_ in zip(numbers, np.ravel(ids))]

    def _streams(self, domains: Sequence[Samples]) -> list[Stream]:
        if self.weights:
            return [mixed(domains, [self.weights[domain.name] for domain in domains], self.seed)]
        firsts = np.cumsum([0, *(len(domain) for domain in domains)])
        return [shuffled(domain, self.seed, int(first)) for domain, first in zip(domains, firsts)]


class Batches(Iterator[Batch]):
    """A process's part of successive batches; ends the run, by InputError, where too many samples are bad: of all, or,
    so that an outage is seen late in a long run too, of each 4,096.

    `counts` are what was counted since the start, by reason; `read` is how many samples were made.
    """

    def __init__(self, ahead: Ahead, bad_limit: float):
        self._ahead, self._limit = ahead, bad_limit
        self.counts, self.read = np.zeros(len(COUNTED), np.int64), 0
        self._recent, self._recent_read = np.zeros(len(REASONS), np.int64), 0
        self._told = False

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self.counts += batch["bad"]
        self.read += batch["ids"].size
        self._recent += batch["bad"][: len(REASONS)]
        self._recent_read += batch["ids"].size
        self._check(self.counts[: len(REASONS)], self.read)
        self._check(self._recent, self._recent_read, _WINDOW)
        if self._recent_read + self._recent.sum() >= _WINDOW:
            self._recent, self._recent_read = np.zeros_like(self._recent), 0
        self._tell()
        return batch

    def close(self) -> None:
        """Ends worker processes."""
        self._ahead.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, counts: np.ndarray, read: int, window: int = 0) -> None:
        """InputError as soon as the bad samples are too many of those that were tried, or of a whole window."""
        bad = int(counts.sum())
        tried = read + bad
        if too_many(bad, max(tried, window), self._limit):
            self.close()
            reasons = listed((reason, count) for reason, count in zip(REASONS, counts) if count)
            what = f"{'the last ' if window else ''}{tried} samples read"
            raise InputError(
                f"{bad} of {what} are bad ({reasons}), over data.bad_limit = {self._limit}; "
                "mend the data or raise the limit"
            )

    def _tell(self) -> None:
        """Says once where more captions are dropped than used."""
        too_long = int(self.counts[COUNTED.index(TOO_LONG)])
        if not self._told and too_long > max(self.read, _MANY):
            self._told = True
            say(
                f"{too_long} of {self.read + too_long} captions are longer than data.max_caption and left out; "
                "raise it, or set data.long_captions to truncate"
            )


@dataclass(frozen=True)
class _Batches:
    """Random access to a process's part of batches: expert by expert, the streams' next rows one stream after the
    other."""

    experts: Sequence[Sequence[Stream]]
    layout: Rows
    rows: int  # of an expert in the whole batch ...
    own: range  # ... and the process's part of them

    def __len__(self) -> int:
        return sys.maxsize // (self.rows * self.layout.images)

    def __getitem__(self, step: int) -> Batch:
        return {key: part.whole() for key, part in self.parts(step).items()}

    def parts(self, step: int) -> dict[str, Part]:
        """The batch whose arrays are not put together yet."""
        counts: Counter[str] = Counter()
        drawn = [self._drawn(streams, step, row, counts) for streams in self.experts for row in self.own]
        rows = []
        for samples in drawn:
            row, cut = self.layout.row([sample.caption for sample in samples])
            rows.append(row)
            counts[CUT] += cut
        visual = "images" if "image" in drawn[0][0].sample else "features"
        field = "image" if visual == "images" else "features"
        shape = (len(self.experts), len(self.own))
        parts = {key: Part([row[key] for row in rows], shape) for key in rows[0]}
        pictures = [one.sample[field] for samples in drawn for one in samples]
        parts[visual] = Part(pictures, (*shape, self.layout.images))
        parts["ids"] = Part([np.array([one.id for one in samples], np.int64) for samples in drawn], shape)
        parts["bad"] = Part([np.array(counts[reason], np.int64) for reason in COUNTED], (len(COUNTED),))
        return parts

    def _drawn(self, streams: Sequence[Stream], step: int, row: int, counts: Counter[str]) -> list[Drawn]:
        """The samples of one row of the whole batch."""
        each, images = self.rows // len(streams), self.layout.images
        stream, first = streams[row // each], (step * each + row % each) * images
        return [stream.draw(place, self.layout.captioner, counts) for place in range(first, first + images)]
