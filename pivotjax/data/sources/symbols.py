"""Symbols: Font Awesome's free glyphs, captioned by label and search terms ("award, guarantee, honor")."""

import json
from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.concepts import normalise
from pivotjax.data.sources.base import Item, Source

_FOLDER = "fontawesomefree/static/fontawesomefree/"
_STYLES = ("solid", "regular")  # brands stay out: their captions are names of firms
_TERMS = 2


def items(files: dict[str, Path]) -> list[Item]:
    """Every free solid or regular glyph; the two styles of one label share its concept."""
    wheel = files["fontawesome"]
    table = json.loads(members(wheel, _FOLDER + "metadata/icons", ".json")[""])
    found = []
    for style in _STYLES:
        for name, svg in members(wheel, f"{_FOLDER}svgs/{style}/", ".svg").items():
            label = table[name]["label"].lower()
            caption = ", ".join([label, *_terms(label, table[name]["search"]["terms"])])
            found.append(Item(f"symbols/{style}/{name}", normalise(label), caption, svg, "svg"))
    return found


def _terms(label: str, terms: list) -> list[str]:
    """The first search terms that add a word to the label."""
    words = [" ".join(str(term).lower().split()) for term in terms]
    return [term for term in dict.fromkeys(words) if not set(term.split()) <= set(label.split())][:_TERMS]


SOURCE = Source(
    name="symbols",
    assets=("fontawesome",),
    licence=ASSETS["fontawesome"].licence,
    attribution=ASSETS["fontawesome"].attribution,
    items=items,
)
