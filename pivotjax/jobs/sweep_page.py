"""A sweep's page: `sweep.html` and `sweep.png` beside its table."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pivotjax import files
from pivotjax.pages import html
from pivotjax.pages.figures import (
    GOOD_TO_BAD,
    INK,
    WIDTH,
    Plot,
    colour_of,
    grid,
    legend_above,
    number,
    png,
    row_of_axes,
)
from pivotjax.pages.html import plain, table

_SHOWN = 12  # candidates that are listed without a click
_CAPTION = (
    "Calibration loss by option: every candidate (pale), and the best at each value (line); ring: chosen. Dotted: the "
    "best expert as it is."
)


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Writes the page and its figure into `folder`.

    Args:
        folder: exists.
        found: as read back from `sweep.json`: "method", "over" {option: values}, "trials" [{options, loss}], "best",
            "references" {base and experts: loss}, "on", "recipe", "versions", "created".

    Returns:
        The path of the page.
    """
    plot = draw(found)
    picture = png(plot.figure)
    files.write_bytes(folder / "sweep.png", picture)
    options = ", ".join(f"{option} = {plain(value)}" for option, value in found["best"]["options"].items())
    lead = f"<p>Best: {escape(options)}, with a loss of {found['best']['loss']:.4f} nats a token.</p>"
    measured = {key: value for key, value in found["on"].items() if value and key in ("captions", "domains")}
    sections = {
        "Loss": html.figure(picture, plot.alt, _CAPTION),
        "Candidates": _candidates(found),
        "For comparison": html.facts("loss of", {name: number(loss) for name, loss in found["references"].items()}),
        "Run": html.facts("measured on", measured) + html.facts("versions", found["versions"]),
    }
    subtitle = f"{escape(found['created'])} · {len(found['trials'])} candidates"
    note = "<p class=note>Chosen on calibration data: the test split says how good the choice is.</p>"
    title = f"Sweep of {found['method']} over {', '.join(found['over'])}"
    page = html.document(title, subtitle, f'<div class="lead">{lead}</div>{note}', sections)
    files.write_bytes(folder / "sweep.html", page.encode())
    return folder / "sweep.html"


def draw(found: dict[str, Any]) -> Plot:
    """A panel an option; a map of losses beside them where there are two."""
    over = found["over"]
    panels = len(over) + (len(over) == 2)
    figure, axes = row_of_axes(panels, height=3.2, width=WIDTH if panels < 3 else WIDTH * 1.25)
    for axis, option in zip(axes, over):
        _profile(axis, found, option)
    axes[0].set_ylabel("calibration loss, nats a token", fontsize=8.5)
    if len(over) == 2:
        _map(axes[-1], found)
    legend_above(figure, axes[0], 3)
    return Plot(figure, f"Calibration loss over {', '.join(over)}.")


def _profile(axis: Axes, found: dict[str, Any], option: str) -> None:
    """Loss over one option: all candidates, and the best at each value whatever the others are."""
    values = found["over"][option]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    place = {repr(value): value if numeric else i for i, value in enumerate(values)}
    at = {key: [number(t["loss"]) for t in found["trials"] if repr(t["options"][option]) == key] for key in place}
    least = {key: np.nanmin(losses) if np.isfinite(losses).any() else np.nan for key, losses in at.items()}
    if len(found["over"]) > 1:
        x = [place[key] for key, losses in at.items() for _ in losses]
        axis.plot(x, [loss for losses in at.values() for loss in losses], ".", color=colour_of(0), alpha=0.25)
    order = sorted(place, key=place.get)
    axis.plot([place[key] for key in order], [least[key] for key in order], ".-", color=colour_of(0),
              linewidth=1.5 if numeric else 0.8, label="best at each value")  # fmt: skip
    best = found["best"]
    axis.plot(place[repr(best["options"][option])], best["loss"], "o", color=colour_of(0), markersize=9,
              fillstyle="none", label="chosen")  # fmt: skip
    experts = [number(loss) for name, loss in found["references"].items() if name != "base"]
    axis.axhline(np.nanmin(experts), color=INK, linewidth=0.9, linestyle=":", label="best expert")
    if not numeric:
        axis.set_xticks(range(len(values)), [plain(value) for value in values], fontsize=8)
    axis.set_xlabel(option, fontsize=8.5)
    grid(axis)


def _map(axis: Axes, found: dict[str, Any]) -> None:
    """Loss over two options."""
    (rows, down), (columns, across) = found["over"].items()
    losses = np.full((len(down), len(across)), np.nan)
    for trial in found["trials"]:
        losses[down.index(trial["options"][rows]), across.index(trial["options"][columns])] = number(trial["loss"])
    axis.imshow(losses, cmap=GOOD_TO_BAD, aspect="auto")
    dark = losses < np.nanmin(losses) + 0.25 * (np.nanmax(losses) - np.nanmin(losses))
    if losses.size <= 60:
        for (row, column), loss in np.ndenumerate(losses):
            text, colour = "–" if np.isnan(loss) else f"{loss:.2f}", "white" if dark[row, column] else INK
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(across)), [plain(value) for value in across], fontsize=7.5, rotation=60)
    axis.set_yticks(range(len(down)), [plain(value) for value in down], fontsize=7.5)
    axis.set_xlabel(columns, fontsize=8.5)
    axis.set_ylabel(rows, fontsize=8.5)


def _candidates(found: dict[str, Any]) -> str:
    """All candidates, the best first."""
    order = sorted(found["trials"], key=lambda trial: np.inf if trial["loss"] is None else trial["loss"])
    rows = [
        f"<tr><th scope=row>{i}</th>{''.join(f'<td>{escape(plain(v))}</td>' for v in trial['options'].values())}"
        f"<td>{'–' if trial['loss'] is None else format(trial['loss'], '.4f')}</td></tr>"
        for i, trial in enumerate(order, 1)
    ]
    heads = ["", *map(escape, found["over"]), "loss"]
    rest = html.details(f"All {len(rows)} candidates", table(heads, rows)) if len(rows) > _SHOWN else ""
    return table(heads, rows[:_SHOWN]) + rest
