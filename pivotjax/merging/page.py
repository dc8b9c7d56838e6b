"""The report of a merge as one HTML page beside `merge_report.json`: no scripts, no network, images inside.

It shows a report as `pivotjax.merge` makes it (`Merge.report`: method, options, experts, layers, exceptions; `brief` or
`full`), and, where a job added them: "title", "created", "notes" [str], "inputs" {name: {what: value}}, "versions"
{name: version}, "recipe" (any), "tuned" {option, values, loss, best}.
"""

import json
from collections.abc import Mapping
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

_CAPTIONS = {
    "sizes": "Left: Frobenius norm of each update, and of the merged one as the method made it. Right: effective rank, "
    "(Σs²)² / Σs⁴ over the singular values s: how many directions of equal size would hold the same energy.",
    "cosines": "Cosines between the experts' updates, and of the merged update to each. Near 0, weights have little "
    "direction in common, whatever the functions share.",
    "spectra": "Leading singular values of the updates, and of the merge. A merge far below the experts has lost what "
    "they do not share; a flat one treats all directions alike.",
    "overlap": "Cosines of the principal angles between the leading singular subspaces of two experts: 1 is a "
    "direction that both have. Dotted: the root mean square for random spaces of that size.",
    "consensus": "Along the leading directions of all updates together: |mean of the experts| / mean of |expert|. "
    "1 where all agree; dotted: unrelated experts, one over the square root of their number.",
    "conflicts": "Where experts' signs differ. Below the diagonal: share of entries; above: weighted by magnitude; "
    "white at one half, where signs are unrelated. In the titles: entries at which not all experts have one sign.",
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

    title = report.get("title") or f"{report['method']}: a merge of {_listed(report['experts'])}"
    lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in headlines(report))
    notes = "".join(f"<p class=note>{escape(str(note))}</p>" for note in report.get("notes", []))
    sections = {
        "Method": _method(report),
        "Inputs": _inputs(report),
        "Not merged by the formula": _exceptions(report),
        "The updates": shown("sizes", "cosines", "spectra"),
        "What the experts share": shown("overlap", "consensus", "conflicts"),
        "The merge": shown("distances", "weights"),
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
    merges = [facts["merge"] | {"norms": facts["update_norms"]} for facts in layers.values() if facts.get("merge")]
    if merges:
        lengths = [number(m["norm"]) / max(np.mean([number(n) for n in m["norms"].values()]), 1e-30) for m in merges]
        mean = {name: np.mean([number(m["distance"][name]) for m in merges]) for name in report["experts"]}
        nearest = min(mean, key=mean.get)
        said.append(f"The merged update is {_range(np.array(lengths), 'times')} as long as an expert's on average; "
                    f"nearest to it is {nearest}, at {mean[nearest]:.2f} of that expert's length.")
    return said


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
    rows = []
    for option, value in report.get("options", {}).items():
        default = method.options.get(option) if method else None
        kept = " class=best" if value != default else ""
        rows.append(f"<tr><th scope=row>{escape(option)}</th><td{kept}>{escape(_setting(value))}</td>"
                    f"<td>{escape(_setting(default))}</td></tr>")  # fmt: skip
    return body + (table(["option", "value", "default"], rows) if rows else "")


def _setting(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else plain(value)


def _inputs(report: Mapping[str, Any]) -> str:
    inputs = report.get("inputs") or {name: {} for name in report["experts"]}
    keys = list(dict.fromkeys(key for facts in inputs.values() for key in facts))
    rows = [
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td class=text>{escape(_setting(facts.get(key)))}</td>" for key in keys) + "</tr>"
        for name, facts in inputs.items()
    ]  # fmt: skip
    return table(["model", *(TEXT_HEAD.format(escape(key)) for key in keys)], rows)


def _exceptions(report: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><th scope=row>{escape(path)}</th><td class=text>{escape(str(what))}</td></tr>"
        for path, what in report.get("exceptions", {}).items()
    ]
    heads = ["tensor", TEXT_HEAD.format("what was done instead")]
    return _folded(f"{len(rows)} tensors", heads, rows)


def _numbers(report: Mapping[str, Any]) -> str:
    """A row a layer with what fits into one."""
    rows, experts = [], list(report["experts"])
    for label, facts in report.get("layers", {}).items():
        norms, merge, signs = (facts.get(key) or {} for key in ("update_norms", "merge", "sign_conflicts"))
        cells = [facts.get("rank"), facts.get("energy_kept"), facts.get("rescale"), signs.get("share"),
                 merge.get("norm"), merge.get("effective_rank")]  # fmt: skip
        cells = "".join(f"<td>{fixed(cell)}</td>" for cell in cells)
        own = "".join(f"<td>{fixed(norms.get(name))}</td>" for name in experts)
        away = "".join(f"<td>{fixed(merge.get('distance', {}).get(name))}</td>" for name in experts)
        shape = " × ".join(map(str, facts.get("shape", []))) or "–"
        rows.append(f"<tr><th scope=row>{escape(label)}</th><td>{shape}</td>{own}{cells}{away}</tr>")
    heads = ["layer", "shape", *(f"norm: {escape(name)}" for name in experts), "rank of the space", "energy kept",
             "rescaled by", "both signs", "norm: merge", "effective rank: merge",
             *(f"distance to {escape(name)}" for name in experts)]  # fmt: skip
    return _folded("A row a layer", heads, rows) if rows else ""


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
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
