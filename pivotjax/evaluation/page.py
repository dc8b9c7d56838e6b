"""The report as one HTML page: no scripts, no network, images inside."""

import json
import math
from collections.abc import Sequence
from html import escape

from pivotjax.evaluation.plots import columns, pretty
from pivotjax.pages import html
from pivotjax.pages.figures import number
from pivotjax.pages.html import TEXT_HEAD, fixed, plain, table

Figures = dict[str, tuple[bytes, str]]  # name -> PNG, alternative text

_CAPTIONS = {
    "heatmap": "Every projector on every domain. Colours run from the best (blue) to the worst of each column; the "
    "framed column is the mean over the trained domains.",
    "comparisons": "Paired differences on the same test items with 95 % intervals: left of zero PivotMerge has the "
    "lower loss.",
    "control": "Control: the caption stays, the image is another item's of the same domain. A projector whose interval "
    "holds zero is not shown to use the image.",
    "training": "Loss a token on training batches; pale: every point, strong: running mean.",
    "spectra": "Left: the spectrum that ranks the shared directions. Right: consensus per direction, 1 where all "
    "experts agree; unrelated experts lie at the dotted line, one over the square root of their number.",
    "weights": "How much each expert counts in each layer of each merge; dotted: all alike.",
    "cosines": "Cosines between the experts' updates. Near 0 the experts' weights have little direction in common, "
    "whatever their functions share.",
    "tuning": "Chosen on the calibration split; the test split above was not looked at.",
}


def render(report: dict, headlines: Sequence, verdicts: Sequence, figures: Figures) -> str:
    """The page.

    Args:
        report: as read back from `report.json`.
        headlines: sentences for the top (`report.Headline`).
        verdicts: paired comparisons on the trained mean (`report.Verdict`).
        figures: name -> (PNG, alternative text).
    """
    title = report.get("title") or "pivotjax report"
    sections = {
        "Results": _results(report, figures),
        "PivotMerge against the others": _comparisons(report, verdicts, figures),
        "Samples": _samples(report),
        "Training": _training(report, figures),
        "Are images used?": _figure("control", figures),
        "Inside the merges": _merges(report, figures),
        "Tuned scales": _tuned(report, figures),
        "Data and attribution": _data(report),
        "Run": _run(report),
    }
    lead = "".join(map(_headline, headlines))
    notes = "".join(f"<p class=note>{escape(str(note))}</p>" for note in report.get("notes", []))
    opening = (f'<div class="lead">{lead}</div>\n' if lead else "") + notes
    return html.document(title, _subtitle(report), opening, sections)


def _headline(headline) -> str:
    points = "".join(f"<li class={reading}>{escape(words)}</li>" for reading, words in headline.points)
    return f"<p>{escape(headline.text)}</p>" + (f"<ul>{points}</ul>" if points else "")


def _subtitle(report: dict) -> str:
    parts = [escape(str(report["created"]))] if report.get("created") else []
    seconds = sum(number(s) for s in report.get("wall_seconds", {}).values())
    if seconds:
        parts.append(f"{_duration(seconds)} in all")
    if report.get("seeds"):
        parts.append(f"{'seeds' if len(report['seeds']) > 1 else 'seed'} {', '.join(map(str, report['seeds']))}")
    if report.get("command"):
        parts.append(f"<code>{escape(str(report['command']))}</code>")
    return " · ".join(parts)


def _results(report: dict, figures: Figures) -> str:
    projectors, across = report.get("projectors", {}), columns(report)
    if not projectors or not across:
        return ""
    body = _figure("heatmap", figures)
    seeds = len(report.get("seeds", [])) > 1
    spread = "; ± is the standard deviation over seeds" if seeds else ""
    for metric, heading in (("loss", "Loss, nats a token (low is good)"), ("retrieval", "Retrieval accuracy")):
        body += f"<h3>{heading}</h3>" + _result_table(report, metric)
    return body + (
        f"<p class=note>Small print: 95 % bootstrap interval over the test items{spread}. Bold: best of the column. "
        f"{_chance(report)}</p>"
    )


def _result_table(report: dict, metric: str) -> str:
    projectors, across = report["projectors"], columns(report)
    head = [_column_head(report, column) for column in across]
    best = {}
    for column in across:
        values = [number(row.get(column, {}).get(metric, {}).get("mean")) for row in projectors.values()]
        finite = [value for value in values if not math.isnan(value)]
        best[column] = (min if metric == "loss" else max)(finite) if finite else None
    rows, family = [], None
    for name, row in projectors.items():
        cells = "".join(
            _estimate_cell(row.get(column, {}).get(metric), metric, best[column], column == "trained")
            for column in across
        )
        group = "" if family in (None, _family(name)) else " class=group"
        family = _family(name)
        rows.append(f"<tr{group}><th scope=row>{escape(pretty(name))}</th>{cells}</tr>")
    return table(["projector", *head], rows)


def _estimate_cell(value: dict | None, metric: str, best: float | None, mean_column: bool) -> str:
    classes = ["mean"] * mean_column
    if value is None or math.isnan(number(value.get("mean"))):
        return f'<td class="{" ".join(classes)}">–</td>'
    classes += ["best"] * (value["mean"] == best)
    scale, digits = (100, 0) if metric == "retrieval" else (1, 2)
    mean, low, high = (f"{scale * number(value[key]):.{digits}f}" for key in ("mean", "low", "high"))
    unit = " %" if metric == "retrieval" else ""
    spread = f" ± {scale * number(value['spread']):.{digits}f}" if value.get("spread") is not None else ""
    return f'<td class="{" ".join(classes)}">{mean}{unit}{spread}<small>{low} to {high}</small></td>'


def _chance(report: dict) -> str:
    """Chance levels of the retrieval task."""
    levels = {d: domain.get("choices") for d, domain in report.get("domains", {}).items() if domain.get("choices")}
    if not levels:
        return ""
    return "Chance: " + ", ".join(f"{d} 1 in {choices}" for d, choices in levels.items()) + "."


def _comparisons(report: dict, verdicts: Sequence, figures: Figures) -> str:
    body = _figure("comparisons", figures)
    pivots = list(dict.fromkeys(v.a for v in verdicts))
    if not pivots:
        return body
    found = {(v.a, v.b): v for v in verdicts}
    others = [name for name in report.get("projectors", {}) if name not in pivots]
    rows = []
    for other in others:
        cells = []
        for pivot in pivots:
            verdict = found.get((pivot, other))
            if verdict is None or verdict.reading == "missing":
                cells.append("<td>–</td>")
                continue
            mean, low, high = (_signed(number(verdict.difference[key])) for key in ("mean", "low", "high"))
            cells.append(f"<td class={verdict.reading}>{mean}<small>{low} to {high}</small></td>")
        rows.append(f"<tr><th scope=row>{escape(pretty(other))}</th>{''.join(cells)}</tr>")
    verdict_table = table(["difference in loss to …", *(escape(pretty(p)) for p in pivots)], rows)
    return (
        f"{body}<h3>Mean of the trained domains</h3>{verdict_table}<p class=note>PivotMerge's loss minus the other's, "
        "on the same items: <span class=better>green</span> PivotMerge better, <span class=worse>red</span> worse, "
        "<span class=unclear>grey</span> the interval holds zero.</p>"
    )


def _samples(report: dict) -> str:
    cards = []
    for sample in report.get("samples", []):
        generated = "".join(
            f"<dt>{escape(pretty(name))}</dt><dd>{escape(text.strip()) or '–'}</dd>"
            for name, text in sample.get("generated", {}).items()
        )
        image = ""
        if sample.get("image_png_base64"):
            source = f"data:image/png;base64,{escape(sample['image_png_base64'])}"
            image = f'<img src="{source}" alt="{escape(sample["caption"], quote=True)}">'
        cards.append(
            f'<div class="sample">{image}<span class=domain>{escape(sample["domain"])}</span>'
            f"<span class=truth>{escape(sample['caption'])}</span><dl>{generated}</dl></div>"
        )
    if not cards:
        return ""
    return f"<p class=note>Test images; bold: the true caption.</p><div class=samples>{''.join(cards)}</div>"


def _training(report: dict, figures: Figures) -> str:
    diverged = report.get("training", {}).get("diverged", [])
    text = f"<p class=worse>Stopped, not finite: {escape(', '.join(diverged))}.</p>" if diverged else ""
    return text + _figure("training", figures)


def _merges(report: dict, figures: Figures) -> str:
    body = "".join(_figure(name, figures) for name in ("cosines", "spectra", "weights"))
    rows = []
    for name, merge in report.get("merges", {}).items():
        given = {key: value for key, value in merge.get("options", {}).items() if value is not None}
        options = ", ".join(f"{key} {plain(value)}" for key, value in given.items())
        for i, (layer, found) in enumerate(merge.get("layers", {}).items()):
            norms = ", ".join(f"{expert} {number(norm):.3g}" for expert, norm in found.get("update_norms", {}).items())
            numbers = "".join(f"<td>{fixed(found.get(key))}</td>" for key in ("rank", "energy_kept", "rescale"))
            rows.append(
                f"<tr{'' if i else ' class=group'}><th scope=row>{'' if i else escape(pretty(name))}</th>"
                f"<td class=text>{escape(layer)}</td><td class=text>{escape(norms)}</td>{numbers}"
                f"<td class=text>{'' if i else escape(options)}</td></tr>"
            )
    if rows:
        words = map(TEXT_HEAD.format, ("layer", "norm of each update"))
        heads = ["merge", *words, "rank", "energy kept", "rescaled by", TEXT_HEAD.format("options")]
        body += html.details("Numbers of every merge and layer", table(heads, rows))
    return body


def _tuned(report: dict, figures: Figures) -> str:
    rows = [
        f"<tr><th scope=row>{escape(pretty(name))}</th><td>{escape(str(t.get('option', 'scale')))}</td>"
        f"<td>{escape(plain(t.get('best')))}</td>"
        f"<td class=text>{escape(', '.join(map(plain, t.get('values', []))))}</td></tr>"
        for name, t in report.get("tuned", {}).items()
    ]
    if not rows:
        return ""
    head = ["method", "option", "chosen", TEXT_HEAD.format("tried")]
    return _figure("tuning", figures) + table(head, rows)


def _data(report: dict) -> str:
    rows = []
    for name, domain in report.get("domains", {}).items():
        counts = "".join(f"<td>{escape(plain(domain.get(split)))}</td>" for split in ("train", "calibration", "test"))
        dropped = domain.get("dropped") or {}
        dropped = ", ".join(f"{k} {v}" for k, v in dropped.items()) if isinstance(dropped, dict) else str(dropped)
        rows.append(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(domain.get('role', 'trained'))}</td>{counts}"
            f"<td class=text>{escape(dropped) or '–'}</td><td class=text>{escape(str(domain.get('licence', '')))}</td>"
            f"<td class=text>{_linked(str(domain.get('attribution', '')))}</td></tr>"
        )
    if not rows:
        return ""
    words = map(TEXT_HEAD.format, ("left out", "licence", "attribution"))
    heads = ["domain", "role", "train", "calibration", "test", *words]
    return table(heads, rows)


def _run(report: dict) -> str:
    seconds = report.get("wall_seconds", {})
    tables = []
    if seconds:
        rows = [f"<tr><th scope=row>{escape(k)}</th><td>{_duration(number(v))}</td></tr>" for k, v in seconds.items()]
        tables.append(table(["stage", "time"], rows))
    for heading in ("machine", "versions"):
        if report.get(heading):
            tables.append(html.facts(heading, report[heading]))
    body = f"<div class=two>{''.join(tables)}</div>" if tables else ""
    if report.get("config"):
        text = escape(json.dumps(report["config"], indent=2, ensure_ascii=False))
        body += html.details("Configuration", f"<pre>{text}</pre>")
    return body


def _figure(name: str, figures: Figures) -> str:
    return html.figure(*figures[name], _CAPTIONS[name]) if name in figures else ""


def _column_head(report: dict, column: str) -> str:
    if column == "trained":
        return '<th scope=col class="mean">mean of<br>trained</th>'
    unseen = report["domains"].get(column, {}).get("role") == "unseen"
    return f"<th scope=col>{escape(column)}{'<br>(unseen)' if unseen else ''}</th>"


def _family(name: str) -> str:
    """Rows of one kind stand together: start and experts, joint, each method."""
    head = name.split(":")[0]
    return "reference" if head in ("w0", "expert", "joint") else "pivot" if head == "pivot" else "baseline"


def _linked(text: str) -> str:
    """Addresses in an attribution become links (the page loads nothing from them)."""
    words = []
    for word in text.split():
        address = word.rstrip(".,;)")
        if address.startswith(("https://", "http://")):
            rest = escape(word[len(address) :])
            words.append(f'<a href="{escape(address, quote=True)}" rel="noreferrer">{escape(address)}</a>{rest}')
        else:
            words.append(escape(word))
    return " ".join(words)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
