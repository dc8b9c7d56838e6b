"""Outlines: Tabler icons drawn as thin strokes, captioned by their file names."""

from pathlib import Path

from pivotjax.data.assets import ASSETS, members
from pivotjax.data.concepts import normalise
from pivotjax.data.sources.base import Item, Source, distinct


def items(files: dict[str, Path]) -> list[Item]:
    """Every stroked icon. The filled ones stay out: they repeat 660 of the names in the style of the icons domain."""
    drawings = members(files["tabler-icons"], "pytablericons/icons/outline/", ".svg")
    return distinct(
        Item(f"outlines/{name}", normalise(name), name.replace("-", " "), svg, "svg") for name, svg in drawings.items()
    )


SOURCE = Source(
    name="outlines",
    assets=("tabler-icons",),
    licence=ASSETS["tabler-icons"].licence,
    attribution=ASSETS["tabler-icons"].attribution,
    items=items,
)
