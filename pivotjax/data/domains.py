"""How a domain's items are split: by concept, one split of concepts over all domains."""

import hashlib
from collections.abc import Sequence
from typing import Literal

from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError

Split = Literal["train", "calibration", "test"]
SPLITS: dict[Split, float] = {"train": 0.75, "calibration": 0.10, "test": 0.15}


def split_of(concept: str, seed: int) -> Split:
    """The split of a concept, by hash: the same in every domain, whatever else is there (shares: `SPLITS`)."""
    place = _fraction("split", concept, seed)
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "test"  # rounding of the shares' sum


def select(
    name: str, items: Sequence[Item], *, train: int | None, calibration: int | None, test: int | None, seed: int
) -> dict[Split, list[Item]]:
    """At most that many items a split (None: all), in a fixed hashed order that a larger limit only extends.

    For shapes the concept is the image (see the source): its 24 captions are seen in every split on purpose.
    InputError where a split that was asked for stays empty.
    """
    limits = {"train": train, "calibration": calibration, "test": test}
    ordered = sorted(items, key=lambda item: (_fraction("order", item.key, seed), item.key))
    chosen: dict[Split, list[Item]] = {}
    for split, limit in limits.items():
        chosen[split] = [item for item in ordered if split_of(item.concept, seed) == split][:limit]
        if not chosen[split] and limit != 0:
            raise InputError(f"domain {name} has no {split} items ({len(items)} in all); give it more or leave it out")
    return chosen


def _fraction(purpose: str, text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
