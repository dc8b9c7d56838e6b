"""A domain's name, and how its items are split: by concept, one split of concepts over all domains."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError

Split = Literal["train", "calibration", "test"]
SPLITS: dict[Split, float] = {"train": 0.75, "calibration": 0.10, "test": 0.15}

_NAME = re.compile(r"[\w-][\w.-]*")
# Experts are called as their domains are: in `projectors/` beside W0, and in rows of metrics beside these columns.
RESERVED = frozenset(
    "w0 step learning_rate bad mean seconds_per_step tokens_per_second samples_per_second mfu input_wait "
    "memory_bytes".split()
)


def check_names(names: Iterable[str]) -> None:
    """InputError for a name that cannot be a domain's: no name of a file, or one that a run uses itself."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot name a domain; use letters, digits, - and _ for corpora and topics")
        if name.casefold() in RESERVED:
            raise InputError(f"{name!r} cannot name a domain: a run's own output has that name; give it another")


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
