"""Train, calibration and test of a scenario: near-duplicates stay together, and a group's name decides."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8, Int64, UInt64

from pivotjax.data.domains import SPLITS, Split
from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.base import Assignment
from pivotjax.errors import InputError


@dataclass(frozen=True)
class SplitsConfig:
    """Shares of train, calibration and test."""

    train: float = SPLITS["train"]
    calibration: float = SPLITS["calibration"]
    test: float = SPLITS["test"]

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise InputError(f"train, calibration and test must sum to 1, not {sum(self.shares):g}")

    @property
    def shares(self) -> tuple[float, ...]:
        """In the order of `SPLITS`."""
        return self.train, self.calibration, self.test


def by_group(
    groups: Int64[np.ndarray, " N"], keys: UInt64[np.ndarray, " N"], config: SplitsConfig, seed: int
) -> Int8[np.ndarray, " N"]:
    """The split of each sample, an index of `SPLITS`.

    Args:
        groups: of near-duplicates, named by their smallest index.
        keys: hashes of the samples' names.
        config: the shares.
        seed: of the choice.

    A group goes where the hash of its smallest key falls: other samples, and their order, change nothing for it.
    """
    smallest = np.full(len(keys), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, groups, keys)
    places = hashing.fractions(smallest[groups], "split", seed)
    ends = np.cumsum(config.shares)[:-1]  # the last split takes what rounding leaves
    return np.searchsorted(ends, places, side="right").astype(np.int8)


def indices(assigned: Assignment, splits: Int8[np.ndarray, " N"]) -> dict[str, dict[Split, Int64[np.ndarray, " n"]]]:
    """The samples of each domain and split, ascending."""
    return {
        name: {split: np.flatnonzero((assigned.domains == domain) & (splits == number))
               for number, split in enumerate(SPLITS)}
        for domain, name in enumerate(assigned.names)
    }  # fmt: skip


def check(found: Mapping[str, Mapping[Split, np.ndarray]], config: SplitsConfig) -> None:
    """InputError where a domain has none of a split that it should have."""
    for name, splits in found.items():
        for split, share in zip(SPLITS, config.shares):
            if share and not len(splits[split]):
                total = sum(map(len, splits.values()))
                raise InputError(
                    f"domain {name} has no {split} samples ({total} in all); ask for fewer domains, or for a larger "
                    f"share of {split}"
                )
