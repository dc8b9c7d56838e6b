"""A scenario's contact sheet: what is in each domain, as one page that needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from pivotjax.data.sources.base import Item
from pivotjax.pages import html
from pivotjax.pages.html import TEXT_HEAD, plain, table

SIDE = 112  # pixels of a thumbnail
_SHOWN = 40  # domains in full; the table has all


def render(manifest: Mapping[str, Any], shown: Mapping[str, Sequence[tuple[Item, np.ndarray]]],
           largest: Sequence[Sequence[tuple[Item, np.ndarray]]]) -> str:  # fmt: skip
    """The page's text.

    Args:
        manifest: as it is saved.
        shown: some samples of each domain, with their pictures (uint8 [SIDE, SIDE, 3]).
        largest: some samples of each of the largest groups of near-duplicates.
    """
    sections = {"Domains": _overview(manifest)}
    for name in list(shown)[:_SHOWN]:
        words = ", ".join(manifest["domains"][name]["words"])
        told = f"<p>Telling words: {escape(words)}.</p>" if words else ""
        sections[name] = told + _thumbnails(shown[name])
    sections["Near-duplicates"] = _groups(manifest, largest)
    sections["Left out"] = _left_out(manifest)
    sections["Run"] = _run(manifest)
    used, count = manifest["samples"]["in domains"], len(manifest["domains"])
    title = f"{count} domains by {manifest['recipe']['domains']['by']}"
    corpora = ", ".join(manifest["corpora"])
    return html.document(title, escape(f"{used:,} samples of {corpora} · seed {manifest['seed']}"), "", sections)


def _overview(manifest: Mapping[str, Any]) -> str:
    total = max(manifest["samples"]["in domains"], 1)
    corpora = list(manifest["corpora"]) if len(manifest["corpora"]) > 1 else []
    rows = []
    for name, domain in manifest["domains"].items():
        counts = [part["count"] for part in domain["splits"].values()]
        cells = [f"{sum(counts):,}", f"{sum(counts) / total:.1%}", *(f"{count:,}" for count in counts)]
        cells += [f"{domain['corpora'][corpus]:,}" for corpus in corpora]
        words = escape(", ".join(domain["words"][:6]))
        rows.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}"
                    f"<td class=text>{words}</td></tr>")  # fmt: skip
    heads = ["domain", "samples", "share", "train", "calibration", "test", *(f"of {escape(c)}" for c in corpora)]
    return table([*heads, TEXT_HEAD.format("telling words")], rows)


def _thumbnails(samples: Sequence[tuple[Item, np.ndarray]]) -> str:
    tiles = []
    for item, picture in samples:
        caption = escape(item.caption, quote=True)
        tiles.append(f'<figure title="{escape(item.key, quote=True)}"><img src="{_jpeg(picture)}" alt="{caption}" '
                     f"width={SIDE} height={SIDE}><figcaption>{caption}</figcaption></figure>")  # fmt: skip
    return f'<div class="thumbs">{"".join(tiles)}</div>'


def _jpeg(picture: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _groups(manifest: Mapping[str, Any], largest: Sequence[Sequence[tuple[Item, np.ndarray]]]) -> str:
    groups = manifest["groups"]
    if not groups["tied samples"]:
        return "<p>None were found, or none were looked for.</p>"
    body = (
        f"<p>{groups['tied samples']:,} samples are in {groups['groups of several']:,} groups whose captions or images "
        f"are nearly the same; each group is in one split. The largest has {groups['largest']:,} samples.</p>"
    )
    return body + "".join(f"<h3>Group {n}</h3>{_thumbnails(group)}" for n, group in enumerate(largest, 1))


def _left_out(manifest: Mapping[str, Any]) -> str:
    samples = manifest["samples"]
    counts = samples["bad"] | {"in no domain": samples["in no domain"]}
    return html.facts("samples", {why: f"{count:,}" for why, count in counts.items() if count}) if any(
        counts.values()) else ""  # fmt: skip


def _run(manifest: Mapping[str, Any]) -> str:
    facts = {name: value for name, value in manifest["facts"].items() if not isinstance(value, list)}
    corpora = {name: f"{about['samples']:,} samples, identity {about['identity'][:12]}…"
               for name, about in manifest["corpora"].items()}  # fmt: skip
    recipe = {f"{section}.{key}" if key else section: plain(value) for section, key, value in _flat(manifest["recipe"])}
    return html.facts("corpus", corpora) + (html.facts("of the split", facts) if facts else "") + html.details(
        "Recipe", html.facts("option", recipe))  # fmt: skip


def _flat(values: Mapping[str, Any]):
    for section, value in values.items():
        if not isinstance(value, Mapping):
            yield section, "", value
            continue
        for key, inner, leaf in _flat(value):
            yield section, f"{key}.{inner}" if inner else key, leaf
