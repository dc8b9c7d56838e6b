"""HTML of a page that needs nothing else: no scripts, no network, images inside."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pivotjax.pages.figures import number
from pivotjax.pages.style import STYLE

TEXT_HEAD = '<th class="text" scope=col>{}</th>'  # head of a column of words


def document(title: str, subtitle: str, opening: str, sections: Mapping[str, str]) -> str:
    """A page.

    Args:
        title: text.
        subtitle: HTML of one line below the title.
        opening: HTML before the first section.
        sections: heading -> HTML; empty ones are left out.
    """
    sections = {heading: body for heading, body in sections.items() if body}
    links = " ".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a>' for heading in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>\n<p class=meta>{subtitle}</p>\n<nav>{links}</nav></header>\n{opening}"
        + "".join(
            f'\n<section><h2 id="{_anchor(heading)}">{escape(heading)}</h2>\n{body}\n</section>'
            for heading, body in sections.items()
        )
        + "\n</main>\n</body>\n</html>\n"
    )


def figure(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page, with the text for those who cannot see it and a caption."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><img src="{source}" alt="{escape(alt, quote=True)}">{caption}</figure>\n'


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls inside its own box; heads are HTML, whole <th> where they start with it."""
    head = "".join(h if h.startswith("<th") else f"<th scope=col>{h}</th>" for h in heads)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def facts(heading: str, values: Mapping[str, Any]) -> str:
    """A table of names and values under one heading."""
    rows = [f"<tr><th scope=row>{escape(k)}</th><td class=text>{escape(plain(v))}</td></tr>" for k, v in values.items()]
    return table([heading, ""], rows)


def details(summary: str, body: str) -> str:
    """What opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def plain(value: Any) -> str:
    """A value in words: numbers to four digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fixed(value: float | None) -> str:
    """A number of a report to three digits."""
    return "–" if value is None else f"{number(value):.3g}"


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower()).strip("-")
