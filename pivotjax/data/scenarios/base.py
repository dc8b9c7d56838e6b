"""What a splitter is: a way to give each sample of a corpus to one of K domains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, UInt64

from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.clustering import ClusteringConfig
from pivotjax.data.scenarios.columns import Column, Stored
from pivotjax.data.scenarios.pool import Pool

OUT = -1  # the domain of a sample that no domain takes


class Request(NamedTuple):
    """What a splitter works on: N samples, of which those that are not `good` stay out."""

    pool: Pool
    columns: dict[str, Stored]  # its own, and "embedding" where it asked for it
    keys: UInt64[np.ndarray, " N"]  # hashes of the samples' names
    good: Bool[np.ndarray, " N"]
    count: int  # domains that are wanted, where the splitter does not find them itself
    seed: int
    clustering: ClusteringConfig


@dataclass(frozen=True)
class Assignment:
    """Names of the domains, and the domain of each sample (an index of `names`, or OUT)."""

    names: tuple[str, ...]
    domains: Int16[np.ndarray, " N"]
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class Splitter:
    """A way to split: `assign(options, request)`, with the options of its own section of the recipe (or None).

    `columns(options)` says what has to be known of each sample; `embeds`: its embedding too.
    """

    summary: str
    assign: Callable[[Any, Request], Assignment]
    columns: Callable[[Any], tuple[Column, ...]] = lambda options: ()
    embeds: bool = False


def deal(request: Request, shares: np.ndarray, purpose: str) -> Int16[np.ndarray, " N"]:
    """Hands the good samples out at random, domain k getting `shares[k]` of them to the sample; a sum below 1 leaves
    some out."""
    good = np.flatnonzero(request.good)
    order = good[np.argsort(hashing.ordered(request.keys[good], purpose, request.seed), kind="stable")]
    ends = np.round(np.cumsum(shares) * len(good)).astype(int)
    domains = np.full(len(request.good), OUT, np.int16)
    for domain, (start, end) in enumerate(zip((0, *ends), ends)):
        domains[order[start:end]] = domain
    return domains
