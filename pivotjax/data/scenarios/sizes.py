"""Domains alike in content that differ in size."""

from dataclasses import dataclass

import numpy as np

from pivotjax.data.scenarios.base import Assignment, Request, Splitter, deal
from pivotjax.errors import InputError


@dataclass(frozen=True)
class SizesConfig:
    """How large domains are."""

    shares: tuple[float, ...] = ()
    """Each domain's share of the samples; what they leave of 1 stays out. Empty: by `power`."""
    power: float = 1.0
    """The k-th of `count` domains is proportional to k ** -power; 0: all of one size."""

    def __post_init__(self) -> None:
        if any(share <= 0 for share in self.shares) or sum(self.shares) > 1 + 1e-9:
            raise InputError("shares must be above 0 and sum to at most 1")


def assign(options: SizesConfig, request: Request) -> Assignment:
    """Samples at random to domains of such sizes."""
    weights = np.arange(1, request.count + 1) ** -float(options.power)
    shares = np.array(options.shares) if options.shares else weights / weights.sum()
    names = tuple(f"size{number}" for number in range(len(shares)))
    return Assignment(names, deal(request, shares, "sizes"), {"shares": shares.tolist()})


SPLITTER = Splitter("at random, to domains of different sizes", assign)
