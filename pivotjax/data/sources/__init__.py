"""Where captioned images come from. A new source is one file here and one line in `SOURCES`."""

import difflib

from pivotjax.data.sources import emoji, icons, molecules, outlines, shapes, symbols
from pivotjax.data.sources.base import Item, Source
from pivotjax.errors import InputError

__all__ = ["SOURCES", "Item", "Source", "source"]

SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE for module in (emoji, icons, shapes, symbols, outlines, molecules)
}


def source(name: str) -> Source:
    """The source of that name; InputError with the known and the nearest one where there is none."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown domain {name!r}; {hint}known: {', '.join(SOURCES)}")
    return SOURCES[name]
