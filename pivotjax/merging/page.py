"""The report of a merge as one HTML page beside `merge_report.json`: no scripts, no network, images inside.

It shows a report as `pivotjax.merge` makes it (`Merge.report`: method, options, experts, layers, facts, exceptions;
`brief` or `full`), and, where a job added them: "title", "created", "notes" [str], "inputs" {name: {what: value}},
"measured_from" (the base in words), "left_as_in_base" [tensor], "versions" {name: version}, "recipe" (any).
"""

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pivotjax import files
from pivotjax.merging import plots
from pivotjax.merging.registry import METHODS
from pivotjax.pages import html
from pivotjax.pages.figures import number
from pivotjax.pages.html import TEXT_HEAD, fixed, plain, table

NAME = "merge_report.html"
_SHOWN = 12  # rows of a table that are shown without a click
_NOTHING = "–"

_CAPTIONS = {
    "sizes": "Frobenius norm of each update, and of the merged one as the method made it. Effective rank: (Σs²)² / Σs⁴ "
    "over the singular values s, how many directions of equal size would hold the same energy.",
    "cosines": "Cosines between the experts' updates, and of the merged update to each. Near 0, weights have little "
    "direction in common, whatever the functions share.",
    "spectra": "Leading singular values of the updates, and of the merge. A merge far below the experts has lost what "
    "they do not share; a flat one treats all directions alike.",
    "overlap": "Cosines of the principal angles between the leading singular subspaces of two experts: 1 is a "
    "direction that both have. Dotted: the root mean square for random spaces of that size.",
    "consensus": "Along the leading directions of all updates together: |mean of the experts| / mean of |expert|. "
    "1 where all agree; dotted: unrelated experts, one over the square root of their number.",
    "conflicts": "Where experts' signs differ: shares of a layer's entries, and weighted by magnitude. In tables, "
    "pairs: entries below the diagonal, magnitude above, white at one half (unrelated signs); titles: all experts.",
    "distances": "|merge − expert| / |expert|, of updates: 0 is that expert, 1 is as far as the base.",
    "weights": "What the method reports of itself.",
}


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes `merge_report.html` into `folder`.

    Args:
        folder: made where needed.
        report: see the module; numbers may be missing (None) or whole parts may.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder cannot be written.
    """
    path = files.output_folder(Path(folder)) / NAME
    figures = {name: (png, alt) for name, png, alt in plots.draw(dict(report))}
    files.write_bytes(path, render(report, figures).encode())
    return path


def render(report: Mapping[str, Any], figures: Mapping[str, tuple[bytes, str]]) -> str:
    """The page's text.

    Args:
        report: see the module.
        figures: name -> (PNG, alternative text), as `plots.draw` gives them.
    """

    def shown(*names: str) -> str:
        return "".join(html.figure(*figures[name], _CAPTIONS[name]) for name in names if name in figures)

    title = report.get("title") or f"{report['method']}: a merge of {_listed(list(report['experts']))}"
    lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in headlines(report))
    notes = "".join(f"<p class=note>{escape(str(note))}</p>" for note in report.get("notes", []))
    sections = {
        "Method": _method(report),
        "Inputs": _inputs(report),
        "Not merged by the formula": _exceptions(report),
        "The updates": shown("sizes", "cosines", "spectra"),
        "What the experts share": shown("overlap", "consensus", "conflicts"),
        "The merge": shown("distances", "weights") + _facts(report),
        "Numbers": _numbers(report),
        "Run": _run(report),
    }
    opening = (f'<div class="lead">{lead}</div>\n' if lead else "") + notes
    return html.document(title, _subtitle(report), opening, sections)


def headlines(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: how related the experts are, and what became of them."""
    layers, experts = report.get("layers", {}), len(report["experts"])
    said = []
    cosines = [np.array([[number(v) for v in row] for row in facts["cosines"]]) for facts in layers.values()
               if facts.get("cosines")]  # fmt: skip
    if cosines and experts > 1:
        pairs = np.concatenate([table[np.triu_indices(len(table), 1)] for table in cosines])
        said.append(f"Cosines between the experts' updates: {_range(pairs)}.")
    shared = [facts["shared_directions"]["consensus"] for facts in layers.values() if facts.get("shared_directions")]
    if shared and experts > 1:
        values = np.array([number(v) for found in shared for v in found])
        said.append(f"Consensus along the leading shared directions: {_range(values)}; unrelated experts would have "
                    f"{experts**-0.5:.2f}.")
    merges = [(facts["merge"], facts["update_norms"]) for facts in layers.values() if facts.get("merge")]
    if merges:
        lengths = [number(merge["norm"]) / max(_mean(norms.values()), 1e-30) for merge, norms in merges]
        said.append(f"The merged update is {_range(np.array(lengths), 'times')} as long as an expert's on average.")
        away = {name: _mean(merge["distance"][name] for merge, _ in merges) for name in report["experts"]}
        nearest = min(away, key=lambda name: (np.isnan(away[name]), away[name]))
        if not np.isnan(away[nearest]):
            said.append(f"Nearest to it is {nearest}, at {away[nearest]:.2f} of that expert's length.")
    return said


def _mean(values: Iterable[float | None]) -> float:
    """Of the numbers among the values."""
    finite = [v for v in map(number, values) if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def _range(values: np.ndarray, unit: str = "") -> str:
    """Mean, and least to largest where they differ: `0.12 (-0.01 to 0.30)`."""
    values, unit = values[np.isfinite(values)], unit and f" {unit}"
    if not len(values):
        return f"–{unit}"
    texts = [f"{value:.2f}".replace("-", "−") for value in (values.mean(), values.min(), values.max())]
    return f"{texts[0]}{unit}" if texts[1] == texts[2] else f"{texts[0]}{unit} ({texts[1]} to {texts[2]})"


def _subtitle(report: Mapping[str, Any]) -> str:
    layers = len(report.get("layers", {}))
    parts = [report.get("created"), f"{len(report['experts'])} experts", f"{layers} layers" if layers else None]
    return " · ".join(escape(str(part)) for part in parts if part)


def _method(report: Mapping[str, Any]) -> str:
    method = METHODS.get(report["method"])
    body = ""
    if method:
        body = f"<p><b>{escape(method.name)}</b> ({escape(method.family)}). {escape(method.summary)}</p>"
        body += f"<p class=note>{escape(method.source)}</p>"
    changed, kept = [], []
    for option, value in report.get("options", {}).items():
        default = method.options.get(option) if method else None
        row = f"<tr><th scope=row>{escape(option)}</th><td>{escape(_setting(value))}</td>"
        (kept if value == default else changed).append(f"{row}<td>{escape(_setting(default))}</td></tr>")
    body += table(["option", "value", "default"], changed) if changed else ""
    return body + (html.details("Options at their defaults", table(["option", "value", ""], kept)) if kept else "")


def _setting(value: Any) -> str:
    """A value in words; of hashes the beginning."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(inner)}" for key, inner in value.items())
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        return f"{value[:12]}…"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else plain(value)


def _inputs(report: Mapping[str, Any]) -> str:
    inputs = report.get("inputs") or {name: {} for name in report["experts"]}
    keys = list(dict.fromkeys(key for facts in inputs.values() for key in facts))
    rows = [
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td class=text>{escape(_setting(facts.get(key)))}</td>" for key in keys) + "</tr>"
        for name, facts in inputs.items()
    ]  # fmt: skip
    heads = ["model", *(TEXT_HEAD.format(escape(key)) for key in keys)]
    origin = report.get("measured_from")
    said = f"<p>Updates are measured from: {escape(str(origin))}.</p>" if origin else ""
    return said + _folded(f"{len(rows)} models", heads, rows)


def _exceptions(report: Mapping[str, Any]) -> str:
    done = dict(report.get("exceptions", {})) | dict.fromkeys(report.get("left_as_in_base", []), "left as in the base")
    rows = [
        f"<tr><th scope=row>{escape(path)}</th><td class=text>{escape(str(what))}</td></tr>"
        for path, what in done.items()
    ]
    return _folded(f"{len(rows)} tensors", ["tensor", TEXT_HEAD.format("what was done instead")], rows)


def _numbers(report: Mapping[str, Any]) -> str:
    """A row a layer with what fits into one."""
    rows = {label: _row(facts) for label, facts in report.get("layers", {}).items()}
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    body = [
        f"<tr><th scope=row>{escape(label)}</th>{''.join(f'<td>{row.get(head, _NOTHING)}</td>' for head in heads)}</tr>"
        for label, row in rows.items()
    ]
    return _folded("A row a layer", ["layer", *map(escape, heads)], body) if heads else ""


def _row(facts: Mapping[str, Any]) -> dict[str, str]:
    """Head -> text, of the facts that a layer has."""
    merge, signs = facts.get("merge") or {}, facts.get("sign_conflicts") or {}
    row = {"shape": " × ".join(map(str, facts["shape"]))} if facts.get("shape") else {}
    numbers = {f"norm: {name}": value for name, value in (facts.get("update_norms") or {}).items()}
    numbers |= {"norm: merge": merge.get("norm"), "effective rank: merge": merge.get("effective_rank")}
    numbers |= {f"distance to {name}": value for name, value in (merge.get("distance") or {}).items()}
    numbers |= {"both signs": signs.get("share"), "rank of the space": facts.get("rank")}
    numbers |= {"energy kept": facts.get("energy_kept"), "rescaled by": facts.get("rescale")}
    return row | {head: fixed(value) for head, value in numbers.items() if value is not None}


def _facts(report: Mapping[str, Any]) -> str:
    """What the method says of the merge as a whole."""
    values = {name: _setting(value) for name, value in (report.get("facts") or {}).items()}
    return html.facts("of the merge as a whole", values) if values else ""


def _folded(summary: str, heads: list[str], rows: list[str]) -> str:
    """A table; behind a click where it is long."""
    if not rows:
        return ""
    return table(heads, rows) if len(rows) <= _SHOWN else html.details(summary, table(heads, rows))


def _run(report: Mapping[str, Any]) -> str:
    body = html.facts("versions", report["versions"]) if report.get("versions") else ""
    if report.get("recipe"):
        text = escape(json.dumps(report["recipe"], indent=2, ensure_ascii=False))
        body += html.details("Recipe", f"<pre>{text}</pre>")
    return body


def _listed(words: list[str]) -> str:
    if len(words) > 4:
        return f"{len(words)} experts"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
