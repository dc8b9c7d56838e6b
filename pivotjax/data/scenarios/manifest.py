"""What a scenario's manifest and sheet say: counts, telling words, examples."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from pivotjax.data.decode import BadSample, decode
from pivotjax.data.domains import Split
from pivotjax.data.scenarios import hashing, page, words
from pivotjax.data.scenarios.pool import Pool
from pivotjax.data.sources.base import Item
from pivotjax.progress import bar

_COUNTED = 20_000  # captions of a domain whose words are counted
_SHOWN = 24  # samples of a domain on the sheet
_EXAMPLES = 8  # of them in the manifest
_LARGEST = 6  # groups of near-duplicates on the sheet, and samples of each


class Shown(NamedTuple):
    """A sample with its picture."""

    item: Item
    picture: np.ndarray  # uint8 [page.SIDE, page.SIDE, 3]


def shuffled(samples: Int64[np.ndarray, " n"], keys: UInt64[np.ndarray, " N"], seed: int) -> Int64[np.ndarray, " n"]:
    """The samples in the hashed order in which a scenario shows them."""
    return samples[np.argsort(hashing.ordered(keys[samples], "shown", seed), kind="stable")]


def shown(pool: Pool, samples: Sequence[int], most: int = _SHOWN) -> list[Shown]:
    """The first of the samples with pictures; one that turns out to be bad is passed over (it was counted, or its
    picture was not asked for)."""
    found: list[Shown] = []
    for sample in samples:
        if len(found) == most:
            break
        try:
            item = pool[int(sample)]
            found.append(Shown(item, decode(item, page.SIDE)))
        except BadSample:
            continue
    return found


def domains(
    pool: Pool,
    indices: Mapping[str, Mapping[Split, np.ndarray]],
    files: Mapping[str, Mapping[Split, Mapping[str, Any]]],
    order: Mapping[str, np.ndarray],
    examples: Mapping[str, Sequence[Shown]],
) -> dict[str, dict[str, Any]]:
    """Of each domain: splits (count and hash), samples of each corpus, telling words and examples of its training
    samples.

    Args:
        pool: the samples.
        indices: by domain and split.
        files: facts about the index files.
        order: training samples of each domain, as they are preferred.
        examples: what the sheet shows.
    """
    captions = {
        name: list(_captions(pool, bar(samples[:_COUNTED], f"words of {name}", unit="caption")))
        for name, samples in order.items()
    }
    telling = words.telling(captions)
    return {
        name: {
            "splits": files[name],
            "corpora": _by_corpus(pool, np.concatenate(list(splits.values()))),
            "words": telling[name],
            "examples": [{"key": one.item.key, "caption": one.item.caption} for one in examples[name][:_EXAMPLES]],
        }
        for name, splits in indices.items()
    }


def _captions(pool: Pool, samples: Iterable[int]) -> Iterator[str]:
    """Those that can be read: one that no longer can is no reason to end a long run."""
    for sample in samples:
        with contextlib.suppress(BadSample):
            yield pool.caption(int(sample))


def groups(found: Int64[np.ndarray, " N"]) -> dict[str, int]:
    """How near-duplicates are tied together, of the good samples."""
    sizes = np.bincount(found)
    several = sizes[sizes > 1]
    return {
        "tied samples": int(several.sum()),
        "groups of several": len(several),
        "largest": int(sizes.max(initial=0)),
    }


def largest(pool: Pool, found: Int64[np.ndarray, " N"]) -> list[list[Shown]]:
    """Some samples of each of the largest groups."""
    sizes = np.bincount(found)
    chosen = [group for group in np.argsort(-sizes, kind="stable")[:_LARGEST] if sizes[group] > 1]
    return [shown(pool, np.flatnonzero(found == group)[: 2 * _LARGEST], _LARGEST) for group in chosen]


def _by_corpus(pool: Pool, samples: np.ndarray) -> dict[str, int]:
    counts = np.bincount(pool.number(samples), minlength=len(pool.corpora))
    return {name: int(count) for name, count in zip(pool.corpora, counts)}
