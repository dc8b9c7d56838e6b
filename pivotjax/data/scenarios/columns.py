"""What is known of every sample, computed in one pass and kept on disk: hashes, embeddings, why a sample is bad.

A column is an array with a row a sample. It is computed in blocks of 16,384 samples, a file each, which appear when
they are whole: a pass that was interrupted goes on after its last block, another scenario of the same corpus reads what
is there, and a pass on several hosts shares the blocks out. A block's rows depend on its samples alone, so that the
number of hosts changes nothing. Memory: one block of each column, whatever the corpus.

Columns of one scenario may come from passes of different days, and a sample that can be read today could not be read
then: each column keeps its own reasons why a row says nothing.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int8, UInt8

from pivotjax.data.decode import REASONS, BadSample, decode, listed, too_many
from pivotjax.data.scenarios import arrays, hashing
from pivotjax.data.scenarios.pool import Pool
from pivotjax.errors import InputError
from pivotjax.files import atomic_path
from pivotjax.progress import Bar

BLOCK = 16_384  # samples
_ROWS = 32  # of a batch, a device
_SIDE = 64  # pixels, where no column asks for more
_FORMAT = 2  # part of every name: raise it when decoding or a column's layout changes
GOOD = -1


class Rows(NamedTuple):
    """Some consecutive samples; of bad ones as much as can be read, a black picture for one."""

    keys: list[str]
    captions: list[str]
    reasons: Int8[np.ndarray, "2 B"]  # index into REASONS, or GOOD: of key and caption, and of those and the picture
    pictures: UInt8[np.ndarray, "B S S 3"] | None  # None where no column looks at pictures


class Column(Protocol):
    """One fact a sample.

    Fields:
        name: of the files.
        identity: all that the values depend on beside the corpus and the size of its pictures.
        pixels: side of the square pictures it looks at; 0: captions alone; -1: pictures of any size.
    """

    name: str
    identity: str
    pixels: int

    def __call__(self, rows: Rows) -> np.ndarray:
        """An array with a row for each of `rows`."""
        ...


@dataclass(frozen=True)
class Simple:
    """A column from a function."""

    name: str
    of: Callable[[Rows], np.ndarray]
    identity: str = ""
    pixels: int = 0

    def __call__(self, rows: Rows) -> np.ndarray:
        return self.of(rows)


KEYS = Simple("keys", lambda rows: np.array([hashing.of_text(key) for key in rows.keys], np.uint64))


@dataclass(frozen=True)
class Stored:
    """A column on disk: `N.npy` and `N.reasons.npy` for block N."""

    folder: Path
    count: int

    def block(self, number: int) -> np.ndarray:
        """The rows of one block, memory-mapped."""
        return np.load(self.folder / f"{number}.npy", mmap_mode="r")

    def blocks(self) -> Iterator[np.ndarray]:
        """All blocks in order."""
        return (self.block(number) for number in range(_blocks(self.count)))

    def reasons(self) -> Int8[np.ndarray, " N"]:
        """Of each row why it says nothing: index into REASONS, or GOOD."""
        return np.concatenate([np.load(self.folder / f"{n}.reasons.npy") for n in range(_blocks(self.count))])

    def map(self, of: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
        """A function of each block, one after the other: what it returns has to fit in memory."""
        return np.concatenate([of(block) for block in self.blocks()])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of those samples, in that order."""
        indices = np.asarray(indices)
        order = np.argsort(indices, kind="stable")
        cuts = np.searchsorted(indices[order] // BLOCK, np.arange(_blocks(self.count) + 1))
        first = self.block(0)
        rows = np.empty((len(indices), *first.shape[1:]), first.dtype)
        for number in np.flatnonzero(np.diff(cuts)):
            of_block = order[cuts[number] : cuts[number + 1]]
            rows[of_block] = self.block(number)[indices[of_block] % BLOCK]
        return rows


def scan(
    pool: Pool, columns: Sequence[Column], folder: Path, workers: int = 0, bad_limit: float = 1.0
) -> dict[str, Stored]:
    """All columns of a pool, and always "keys" (64-bit hashes).

    With several processes each computes every n-th block; they need a `folder` that all of them see.

    Args:
        pool: read in order.
        columns: what to compute.
        folder: of the blocks.
        workers: threads that read and decode; 0: one a core.
        bad_limit: share of a block's samples that may be bad. A block with more is not kept: a disk that was away for
            a while would be remembered as bad samples.

    Raises:
        InputError: the folder cannot be written, not all processes see it, or too many samples of a block are bad.
    """
    columns = [KEYS, *columns]
    side = max(c.pixels for c in columns) or (_SIDE if any(c.pixels for c in columns) else 0)
    stored = {column.name: Stored(folder / _name(pool, column, side), len(pool)) for column in columns}
    missing = [
        (number, todo)
        for number in range(_blocks(len(pool)))
        if (todo := [c for c in columns if not (stored[c.name].folder / f"{number}.npy").exists()])
    ]
    mine = [(number, todo) for number, todo in missing if number % jax.process_count() == jax.process_index()]
    if mine:
        _compute(pool, mine, stored, side, workers, bad_limit)
    _meet(stored, missing)
    return stored


def reasons(stored: Mapping[str, Stored]) -> Int8[np.ndarray, " N"]:
    """Why each sample is bad; GOOD where it was good whenever one of the columns was computed."""
    found, *others = (column.reasons() for column in stored.values())
    for other in others:
        found = np.where(found == GOOD, other, found)
    return found


def bad(reasons: Int8[np.ndarray, " N"]) -> dict[str, int]:
    """How many samples are bad, by reason."""
    counts = np.bincount(reasons[reasons != GOOD], minlength=len(REASONS))
    return {reason: int(count) for reason, count in zip(REASONS, counts) if count}


def _compute(
    pool: Pool,
    blocks: list[tuple[int, list[Column]]],
    stored: dict[str, Stored],
    side: int,
    workers: int,
    bad_limit: float,
) -> None:
    with ThreadPoolExecutor(workers or os.cpu_count()) as threads, Bar(_samples(blocks, pool), "scan", "sample") as bar:
        for number, todo in blocks:
            samples = range(number * BLOCK, min((number + 1) * BLOCK, len(pool)))
            side_of_block = side if any(column.pixels for column in todo) else 0
            for name, found in _block(pool, todo, samples, side_of_block, threads, bar, bad_limit).items():
                _write(stored[name].folder / f"{number}.reasons.npy", found.reasons)
                _write(stored[name].folder / f"{number}.npy", found.values)  # the last: it says that both are there


class _Found(NamedTuple):
    """Some rows of a column."""

    values: np.ndarray
    reasons: Int8[np.ndarray, " B"]


def _block(
    pool: Pool,
    columns: Sequence[Column],
    block: range,
    side: int,
    threads: ThreadPoolExecutor,
    bar: Bar,
    bad_limit: float,
) -> dict[str, _Found]:
    size = _ROWS * jax.local_device_count()
    batches = [block[start : start + size] for start in range(0, len(block), size)]
    ahead = [threads.submit(_sample, pool, index, side) for index in batches[0]]
    parts: dict[str, list[_Found]] = {column.name: [] for column in columns}
    found: Counter[str] = Counter()
    for number, batch in enumerate(batches):
        following = batches[number + 1] if number + 1 < len(batches) else ()
        samples, ahead = ahead, [threads.submit(_sample, pool, index, side) for index in following]
        rows = _rows([sample.result() for sample in samples], size, side)
        found.update(bad(rows.reasons[1]))
        _check(found, block, bad_limit)
        for column in columns:
            reasons = rows.reasons[1 if column.pixels else 0]
            parts[column.name].append(_Found(column(rows)[: len(batch)], reasons[: len(batch)]))
        bar.update(len(batch))
    return {name: _Found(*map(np.concatenate, zip(*pieces))) for name, pieces in parts.items()}


def _check(found: Counter[str], block: range, limit: float) -> None:
    """InputError as soon as the bad samples found are too many for the whole block."""
    if too_many(found.total(), len(block), limit):
        raise InputError(
            f"over {limit:.0%} of the samples {block[0]} to {block[-1]} cannot be used ({listed(found.items())}); "
            "mend the data and start again, or raise bad_limit"
        )


class _Sample(NamedTuple):
    """What can be read of a sample."""

    key: str = ""
    caption: str = ""
    picture: np.ndarray | None = None
    reasons: tuple[int, int] = (GOOD, GOOD)  # as in Rows


def _sample(pool: Pool, index: int, side: int) -> _Sample:
    key, caption, known = "", "", False
    try:
        item = pool[index]
        key, caption = item.key, item.caption
        if not caption.strip():
            raise BadSample("empty caption", key)
        known = True
        return _Sample(key, caption, decode(item, side) if side else None)
    except BadSample as error:
        reason = REASONS.index(error.reason)
        return _Sample(key, caption, None, (GOOD if known else reason, reason))


def _rows(samples: list[_Sample], size: int, side: int) -> Rows:
    """A batch; always of `size` rows, so that what is compiled for it is compiled once."""
    samples = samples + [_Sample()] * (size - len(samples))
    pictures = np.zeros((size, side, side, 3), np.uint8) if side else None
    for place, sample in enumerate(samples):
        if sample.picture is not None:
            pictures[place] = sample.picture
    reasons = np.array([sample.reasons for sample in samples], np.int8).T
    return Rows([sample.key for sample in samples], [sample.caption for sample in samples], reasons, pictures)


def _write(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        arrays.save(temporary, values)


def _meet(stored: dict[str, Stored], missing: list[tuple[int, list[Column]]]) -> None:
    """Waits for the other processes' blocks."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("pivotjax scenario: scanned")
    absent = [
        path for number, todo in missing for c in todo if not (path := stored[c.name].folder / f"{number}.npy").exists()
    ]
    if absent:
        raise InputError(
            f"{absent[0]} is not there, though another process wrote it; give a --cache that all hosts see"
        )


def _samples(blocks: list[tuple[int, list[Column]]], pool: Pool) -> int:
    return sum(min(BLOCK, len(pool) - number * BLOCK) for number, _ in blocks)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _name(pool: Pool, column: Column, side: int) -> str:
    seen = side if column.pixels else 0
    text = f"{_FORMAT} {BLOCK} {pool.identity} {column.name} {column.identity} {seen}"
    return f"{column.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
