"""Near-duplicates: samples that must not stand on both sides of train and test, found without comparing all pairs.

Captions: MinHash (Broder 1997) of a caption's words and pairs of neighbouring words, 64 hashes in 16 bands of 4; two
captions that share a band are near where at least `similarity` of their hashes agree. That estimates the Jaccard index
with a standard error of 0.05; pairs at 0.8 share a band with probability 0.9998.

Images: the difference hash of brightness along rows and columns, 128 bits; two are near within `radius` bits, and
within a tenth of those that the plainer one has set: a plain picture has few to differ in. Of `radius + 2` pieces such
a pair has two in common, so that all are met (Manku, Jain and Das Sarma 2007).

Groups are what union-find makes of the pairs: of a chain of near-duplicates all stay together.

Memory: 100 bytes a sample, 1.2 GB for 12 million; the MinHashes (256 bytes a sample) stay on disk. Of samples that have
one band or two pieces in common each is compared with its next 2,048.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8, UInt32, UInt64
from PIL import Image

from pivotjax.config import check_least
from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.columns import Column, Rows, Simple, Stored
from pivotjax.errors import InputError
from pivotjax.progress import bar

_HASHES, _BAND = 64, 4
_BITS = 128
_PLAIN = 10  # bits set for each that may differ
_NEXT = 2048  # samples of one band that each is compared with
_PAIRS = 1 << 20  # compared at a time
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DuplicatesConfig:
    """What counts as the same sample, and so stays in one split."""

    captions: Literal["near", "same", "off"] = "near"
    """Captions that are nearly the same; the same but for case and punctuation; or none."""
    similarity: float = 0.8
    """Jaccard index of words and neighbouring pairs of words from which two captions are near."""
    common: int = 0
    """A caption of more samples than this is a label ("a red circle") and ties nothing; 0: every caption ties."""
    images: Literal["near", "off"] = "near"
    """Images that look nearly the same, or none."""
    radius: int = 5
    """Bits of 128 in which the hashes of two near images may differ, a tenth of those set at most."""

    def __post_init__(self) -> None:
        check_least(self, similarity=0.5, common=0, radius=0)
        if self.similarity > 1 or self.radius > 15:
            raise InputError("similarity must be at most 1, and radius at most 15 bits")


class Groups:
    """Union-find over N samples as one array. A group is named by its smallest index, whatever the order of ties."""

    def __init__(self, count: int):
        self._parent = np.arange(count)

    def tie(self, a: Int[np.ndarray, " P"], b: Int[np.ndarray, " P"]) -> None:
        """a[i] and b[i] are in one group from now on."""
        parent = self._parent
        while True:
            a, b = self.of(a), self.of(b)
            apart = a != b
            if not apart.any():
                return
            a, b = np.maximum(a, b)[apart], np.minimum(a, b)[apart]
            np.minimum.at(parent, a, b)

    def of(self, samples: Int[np.ndarray, " P"]) -> Int64[np.ndarray, " P"]:
        """The group of each of these samples."""
        found = self._parent[samples]
        while not np.array_equal(found, above := self._parent[found]):
            found = above
        self._parent[samples] = found  # the next way is shorter
        return found

    def all(self) -> Int64[np.ndarray, " N"]:
        """The group of every sample."""
        return self.of(np.arange(len(self._parent)))


def columns(config: DuplicatesConfig) -> tuple[Column, ...]:
    """What has to be known of each sample."""
    captions = () if config.captions == "off" else (Simple("minhash", lambda rows: signatures(rows.captions)),)
    images = () if config.images == "off" else (Simple("dhash", _hashes, pixels=-1),)
    return captions + images


def groups(
    stored: dict[str, Stored], good: Bool[np.ndarray, " N"], config: DuplicatesConfig
) -> Int64[np.ndarray, " N"]:
    """The group of each sample, named by its smallest index; samples that are not `good` are alone."""
    found = Groups(len(good))
    if "minhash" in stored:
        _tie_captions(found, stored["minhash"], good, config)
    if "dhash" in stored:
        _tie_images(found, stored["dhash"].map(), good, config.radius)
    return found.all()


def signatures(captions: list[str]) -> UInt32[np.ndarray, "N 64"]:
    """MinHash of each caption; equal where captions differ in case, punctuation and spaces only."""
    hashed = [_shingles(caption) for caption in captions]
    starts = np.cumsum([0, *map(len, hashed[:-1])])
    shingles = np.concatenate(hashed)
    least = [np.minimum.reduceat(hashing.mixed(shingles, salt) >> np.uint64(32), starts) for salt in range(_HASHES)]
    return np.stack(least, axis=1).astype(np.uint32)


def _shingles(caption: str) -> UInt64[np.ndarray, " S"]:
    words = _WORD.findall(unicodedata.normalize("NFKC", caption).casefold()) or [caption.strip()]
    single = np.array([hashing.of_text(word) for word in words], np.uint64)
    return np.concatenate([single, hashing.mixed(single[:-1]) ^ single[1:]])


def difference_hash(picture: np.ndarray) -> UInt64[np.ndarray, " 2"]:
    """Of a uint8 [S, S, 3] picture: which of 8 x 8 cells are brighter than the next in their row, and in their column.

    Source: N. Krawetz 2013, "Kind of like that"; columns as well as rows: B. Hoyt's dhash.
    """
    grey = Image.fromarray(picture).convert("L")
    along = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(np.diff(along, axis=1) < 0).ravel(), (np.diff(down, axis=0) < 0).ravel()])
    return np.packbits(bits).view("<u8")


def _hashes(rows: Rows) -> UInt64[np.ndarray, "B 2"]:
    return np.stack([difference_hash(picture) for picture in rows.pictures])


def _tie_captions(found: Groups, stored: Stored, good: np.ndarray, config: DuplicatesConfig) -> None:
    whole = stored.map(_folded)
    rows = _uncommon(whole, np.flatnonzero(good), config.common)
    rows = _tie_equal(found, whole, rows)
    if config.captions == "same":
        return

    def near(a, b):
        return np.mean(stored.take(a) == stored.take(b), axis=1) >= config.similarity

    bands = range(0, _HASHES, _BAND)
    for start in bar(bands, "near captions", unit="band"):
        keys = stored.map(lambda block, start=start: _folded(block[:, start : start + _BAND]))
        _tie_near(found, keys[rows], rows, near)


def _tie_images(found: Groups, hashes: UInt64[np.ndarray, "N 2"], good: np.ndarray, radius: int) -> None:
    rows = _tie_equal(found, _folded(hashes), np.flatnonzero(good))

    def near(a, b):
        apart = _bits(hashes[a] ^ hashes[b])
        plainer = np.minimum(_bits(hashes[a]), _bits(hashes[b]))
        return (apart <= radius) & (_PLAIN * apart <= plainer)

    for mask in bar(_masks(radius), "near images", unit="table"):
        _tie_near(found, _folded(hashes[rows] & mask), rows, near)


def _bits(hashes: UInt64[np.ndarray, "N 2"]) -> UInt8[np.ndarray, " N"]:
    return np.sum(np.bitwise_count(hashes), axis=1, dtype=np.uint8)


def _masks(radius: int) -> UInt64[np.ndarray, "tables 2"]:
    """Every two of `radius + 2` pieces that the bits are shared out to."""
    piece = np.arange(_BITS) * (radius + 2) // _BITS
    pairs = combinations(range(radius + 2), 2)
    return np.stack([np.packbits((piece == a) | (piece == b)).view("<u8") for a, b in pairs])


def _folded(values: np.ndarray) -> UInt64[np.ndarray, " N"]:
    """One number for each row; different rows have the same by an accident of 1 in 2^64."""
    folded = np.zeros(len(values), np.uint64)
    for column in values.T:
        folded = hashing.mixed(folded ^ column)
    return folded


def _uncommon(keys: UInt64[np.ndarray, " N"], rows: np.ndarray, common: int) -> np.ndarray:
    """The rows whose key at most `common` of them have; all where that is 0."""
    if not common:
        return rows
    _, number, counts = np.unique(keys[rows], return_inverse=True, return_counts=True)
    return rows[counts[number] <= common]


def _tie_equal(found: Groups, keys: UInt64[np.ndarray, " N"], rows: np.ndarray) -> np.ndarray:
    """Ties rows of equal keys; returns the first row of each key."""
    order = rows[np.argsort(keys[rows], kind="stable")]
    same = keys[order[1:]] == keys[order[:-1]]
    found.tie(order[:-1][same], order[1:][same])
    return np.sort(order[np.concatenate([[True], ~same])]) if len(order) else order


def _tie_near(found: Groups, keys: UInt64[np.ndarray, " R"], rows: np.ndarray, near: Callable) -> None:
    """Ties the rows of equal keys that are `near`."""
    for a, b in _pairs(keys, rows):
        apart = found.of(a) != found.of(b)
        a, b = a[apart], b[apart]
        close = near(a, b)
        found.tie(a[close], b[close])


def _pairs(keys: UInt64[np.ndarray, " R"], rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows with equal keys, at most `_PAIRS` at a time."""
    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[order]
    first = np.arange(len(rows))
    for step in range(1, _NEXT + 1):
        first = first[: np.searchsorted(first, len(rows) - step)]
        first = first[keys[first] == keys[first + step]]
        if not len(first):
            return
        for start in range(0, len(first), _PAIRS):
            some = first[start : start + _PAIRS]
            yield rows[some], rows[some + step]
