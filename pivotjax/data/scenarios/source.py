"""Domains by where samples come from."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pivotjax.data.decode import BadSample
from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.base import OUT, Assignment, Request, Splitter
from pivotjax.data.scenarios.columns import Column, Rows, Simple
from pivotjax.data.scenarios.pool import Pool
from pivotjax.errors import InputError

_MOST = 256  # domains


@dataclass(frozen=True)
class SourceConfig:
    """What tells a sample's source."""

    field: Literal["corpus", "key"] = "corpus"
    """The corpus it is in; or its key up to the first slash: in LLaVA's mixtures the data set, of webdataset the
    shard."""


def columns(options: SourceConfig) -> tuple[Column, ...]:
    """The hash of what stands before the slash."""
    return (Simple("prefix", _prefixes),) if options.field == "key" else ()


def _prefixes(rows: Rows) -> np.ndarray:
    return np.array([hashing.of_text(_prefix(key)) for key in rows.keys], np.uint64)


def _prefix(key: str) -> str:
    return key.partition("/")[0]


def assign(options: SourceConfig, request: Request) -> Assignment:
    """A domain a corpus, in the recipe's order; or one a prefix, in alphabetical order."""
    if options.field == "corpus":
        domains = request.pool.number(np.arange(len(request.good))).astype(np.int16)
        return Assignment(tuple(request.pool.corpora), np.where(request.good, domains, OUT))
    prefixes = request.columns["prefix"].map()
    values, number = np.unique(prefixes[request.good], return_inverse=True)
    if len(values) > _MOST:
        raise InputError(f"the keys have {len(values)} different beginnings, over {_MOST}; split by corpus instead")
    good = np.flatnonzero(request.good)
    names = [_name(request.pool, good[number == place]) for place in range(len(values))]
    domains = np.full(len(request.good), OUT, np.int16)
    domains[request.good] = np.argsort(np.argsort(names))[number]
    return Assignment(tuple(sorted(names)), domains)


def _name(pool: Pool, samples: Iterable[int]) -> str:
    """What the keys of these samples begin with, from the first that can still be read."""
    for sample in samples:
        with contextlib.suppress(BadSample):
            return _prefix(pool[int(sample)].key)
    raise InputError("samples that could be read before cannot be any more; check the corpora and start again")


SPLITTER = Splitter("by corpus, or by the first part of the keys", assign, columns)
