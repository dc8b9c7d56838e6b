"""Icons: Material Design Icons, solid black glyphs captioned by their file names."""

from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.concepts import normalise
from pivotjax.data.sources.base import Item, Source, distinct

_STYLES = {"outline", "variant"}


def items(files: dict[str, Path]) -> list[Item]:
    """Every glyph that is not another style of one already there ("account-outline", "bell-off-outline")."""
    glyphs = members(files["material-icons"], "material/templates/.icons/material/", ".svg")
    return distinct(
        Item(f"icons/{name}", normalise(name), name.replace("-", " "), svg, "svg")
        for name, svg in glyphs.items()
        if not _STYLES & set(name.split("-"))
    )


SOURCE = Source(
    name="icons",
    assets=("material-icons",),
    licence=ASSETS["material-icons"].licence,
    attribution=ASSETS["material-icons"].attribution,
    items=items,
)
