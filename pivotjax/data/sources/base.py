"""What a data source is: a name, the assets it reads, and a function from their files to captioned images."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Item:
    """One captioned image, not yet rendered.

    `key` names it uniquely over all domains; `concept` decides its split (see `pivotjax.data.concepts`); `image` is
    what `kind` says: the bytes of an SVG, of a PNG or of any picture that Pillow reads, or a molecule's SMILES.
    """

    key: str
    concept: str
    caption: str
    image: bytes
    kind: Literal["svg", "png", "smiles", "picture"]


@dataclass(frozen=True)
class Source:
    """A domain: `items` gets the wheel of each of `assets` and returns every item in a fixed order.

    `closed_captions`: there are few captions, seen in every split, and retrieval runs among all of them.
    """

    name: str
    assets: tuple[str, ...]
    licence: str
    attribution: str
    items: Callable[[dict[str, Path]], list[Item]]
    closed_captions: bool = False


def distinct(items: Iterable[Item]) -> list[Item]:
    """One item a drawing, of those that share it ("circle", "checkbox blank circle") the one of shortest caption.

    Otherwise their concepts could put one picture on both sides of the split. Equal means the same SVG: some thirty
    pairs in 13,000 that are drawn differently but look the same (the letter O and the digit 0 in a box) stay.
    """
    drawings: dict[bytes, Item] = {}
    for item in items:
        drawing = re.sub(rb"<!--.*?-->", b"", item.image, flags=re.DOTALL).strip()
        known = drawings.setdefault(drawing, item)
        if len(item.caption) < len(known.caption):
            drawings[drawing] = item
    return list(drawings.values())
