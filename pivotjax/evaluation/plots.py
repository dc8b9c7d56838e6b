"""The report's figures. Each function takes the report and returns a Figure with its alternative text, or None where
the report holds nothing to draw. Figures are made without pyplot: no window, no global state."""

from collections.abc import Callable, Iterator

import numpy as np
from matplotlib.axes import Axes

from pivotjax.pages.figures import (
    GOOD_TO_BAD,
    INK,
    WIDTH,
    Plot,
    blank,
    colour_of,
    cosine_map,
    grid,
    legend_above,
    number,
    png,
    row_of_axes,
)

_NAMES = {"w0": "W0 (start)", "joint": "joint training", "average": "average", "task_arithmetic": "task arithmetic"}
_NAMES |= {"ties": "TIES", "regmean": "RegMean", "pivot": "PivotMerge"}


def pretty(name: str) -> str:
    """A projector's name for people: "task_arithmetic:tuned" -> "task arithmetic, tuned"."""
    head, *rest = name.split(":")
    if head == "expert":
        return f"expert: {':'.join(rest)}"
    if head == "pivot" and "calibrated" not in rest:
        rest = ["data-free", *rest]
    return ", ".join([_NAMES.get(head, head.replace("_", " ")), *rest])


def columns(report: dict) -> list[str]:
    """The table's columns: trained domains, their mean, unseen domains."""
    roles = {name: domain.get("role", "trained") for name, domain in report.get("domains", {}).items()}
    present = {column for row in report.get("projectors", {}).values() for column in row}
    trained = [name for name, role in roles.items() if role != "unseen" and name in present]
    unseen = [name for name, role in roles.items() if role == "unseen" and name in present]
    return [*trained, *(["trained"] if "trained" in present else []), *unseen]


def heat_map(report: dict) -> Plot | None:
    """Projector x domain: loss and retrieval."""
    names, across = list(report.get("projectors", {})), columns(report)
    if not names or not across:
        return None
    figure, axes = row_of_axes(2, height=0.34 * len(names) + 1.1, width=WIDTH * 1.25)
    for axis, metric, title in zip(
        axes, ("loss", "retrieval"), ("loss, nats a token (low is good)", "retrieval accuracy")
    ):
        cells = [[report["projectors"][n].get(c, {}).get(metric, {}).get("mean") for c in across] for n in names]
        values = np.array([[number(v) for v in row] for row in cells])
        shown = _from_best_to_worst(values if metric == "loss" else -values)
        axis.imshow(np.ma.masked_invalid(shown), cmap=GOOD_TO_BAD, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = shown[row, column] < 0.2 or shown[row, column] > 0.95
            text = "–" if not np.isfinite(value) else f"{value:.2f}" if metric == "loss" else f"{100 * value:.0f} %"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
        axis.set_xticks(range(len(across)), [_column_title(report, c) for c in across], fontsize=8)
        axis.set_yticks(range(len(names)), [pretty(n) for n in names] if axis is axes[0] else [], fontsize=8.5)
        axis.set_title(title, loc="left", fontsize=9.5)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        if "trained" in across:
            _frame_column(axis, across.index("trained"), len(names))
    return Plot(figure, f"Heat map of loss and retrieval for {len(names)} projectors on {', '.join(across)}.")


def forest(report: dict) -> Plot | None:
    """Paired differences of each PivotMerge projector to every other, on the trained mean and the unseen domains."""
    where = [c for c in columns(report) if c == "trained" or report["domains"][c].get("role") == "unseen"]
    rows = [r for r in report.get("comparisons", []) if r["metric"] == "loss" and r["domain"] in where]
    pivots = list(dict.fromkeys(r["a"] for r in rows))
    others = [name for name in report.get("projectors", {}) if any(r["b"] == name and name not in pivots for r in rows)]
    if not rows or not others:
        return None
    panels = list(dict.fromkeys(r["domain"] for r in rows))
    panels.sort(key=where.index)
    figure, axes = row_of_axes(len(panels), height=0.36 * len(others) + 1.2, sharey=True)
    step = 0.72 / max(len(pivots), 1)
    for axis, panel in zip(axes, panels):
        axis.axvline(0, color=INK, linewidth=0.9)
        for i, pivot in enumerate(pivots):
            found = {r["b"]: r["difference"] for r in rows if r["a"] == pivot and r["domain"] == panel}
            drawn = [(others.index(b), d) for b, d in found.items() if b in others and d["mean"] is not None]
            y = np.array([row + (i - (len(pivots) - 1) / 2) * step for row, _ in drawn])
            ends = np.array([[d["low"], d["mean"], d["high"]] for _, d in drawn]).reshape(-1, 3)
            axis.hlines(y, ends[:, 0], ends[:, 2], color=colour_of(i), linewidth=1.6)
            axis.plot(ends[:, 1], y, "o", color=colour_of(i), markersize=4, label=pretty(pivot))
        axis.set_title(
            "mean of the trained domains" if panel == "trained" else f"{panel} (unseen)", loc="left", fontsize=9.5
        )
        axis.set_xlabel("difference in loss; left of 0: PivotMerge is better", fontsize=8)
        grid(axis, "x")
    axes[0].set_yticks(range(len(others)), [pretty(n) for n in others], fontsize=8.5)
    axes[0].set_ylim(len(others) - 0.4, -0.6)
    legend_above(figure, axes[0], len(pivots))
    return Plot(figure, "Paired differences in loss between PivotMerge and every other projector with 95 % intervals.")


def training_curves(report: dict) -> Plot | None:
    """Training loss of the experts, and of the joint projector beside them."""
    training = report.get("training", {})
    groups = [("experts, one program", training.get("experts", {})), ("joint", training.get("joint", {}))]
    groups = [(title, group["loss curves"]) for title, group in groups if group.get("loss curves")]
    if not groups:
        return None
    figure, axes = row_of_axes(len(groups), height=2.9, sharey=True)
    for axis, (title, curves) in zip(axes, groups):
        for i, (name, curve) in enumerate(curves.items()):
            steps, losses = np.array([[number(x) for x in point] for point in curve]).reshape(-1, 2).T
            colour = colour_of(i)
            axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.9)
            axis.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=name)
        axis.set_title(title, loc="left", fontsize=9.5)
        axis.set_xlabel("step", fontsize=8.5)
        axis.legend(frameon=False, fontsize=8)
        grid(axis)
    axes[0].set_ylabel("training loss, nats a token", fontsize=8.5)
    return Plot(figure, f"Training loss over steps of {', '.join(n for _, curves in groups for n in curves)}.")


def control(report: dict) -> Plot | None:
    """What another item's image costs, by projector and domain."""
    across = [c for c in columns(report) if c != "trained"]
    gains = {name: {c: row[c]["image_gain"] for c in across if "image_gain" in row.get(c, {})}
             for name, row in report.get("projectors", {}).items()}  # fmt: skip
    names = [name for name, found in gains.items() if found]
    if not names:
        return None
    figure, (axis,) = row_of_axes(1, height=0.34 * len(names) + 1.2)
    step = 0.76 / len(across)
    for i, domain in enumerate(across):
        drawn = [(names.index(n), gains[n][domain]) for n in names if gains[n].get(domain, {}).get("mean") is not None]
        y = np.array([row + (i - (len(across) - 1) / 2) * step for row, _ in drawn])
        ends = np.array([[g["low"], g["mean"], g["high"]] for _, g in drawn]).reshape(-1, 3)
        colour = colour_of(i)
        axis.hlines(y, ends[:, 0], ends[:, 2], color=colour, linewidth=1.5)
        axis.plot(
            ends[:, 1], y, "o", color=colour, markersize=3.5, label=_column_title(report, domain).replace("\n", " ")
        )
    axis.axvline(0, color=INK, linewidth=0.9)
    axis.set_yticks(range(len(names)), [pretty(n) for n in names], fontsize=8.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("rise in loss when another item's image is shown, nats a token", fontsize=8.5)
    grid(axis, "x")
    legend_above(figure, axis, len(across))
    return Plot(figure, "Rise in caption loss when each projector is shown another item's image.")


def spectra(report: dict) -> Plot | None:
    """Spectrum and consensus of the shared space, one row a layer, one line a merge."""
    merges = _layers_with(report, "spectrum")
    if not merges:
        return None
    layers = list(dict.fromkeys(layer for found in merges.values() for layer in found))
    experts = max((len(found.get("update_norms", {})) for one in merges.values() for found in one.values()), default=0)
    figure = blank(height=2.6 * len(layers))
    panels = figure.subplots(len(layers), 2, squeeze=False)
    for row, layer in zip(panels, layers):
        for i, (name, found) in enumerate(merges.items()):
            spectrum, consensus = (
                np.array(found.get(layer, {}).get(key) or [], float) for key in ("spectrum", "consensus")
            )
            colour = colour_of(i)
            if spectrum.size:
                row[0].plot(
                    np.arange(1, spectrum.size + 1),
                    spectrum / max(spectrum.max(), 1e-30),
                    color=colour,
                    label=pretty(name),
                )
            if consensus.size:
                row[1].plot(
                    np.arange(1, consensus.size + 1), consensus, color=colour, linewidth=0.8, marker=".", markersize=3
                )
        row[0].set_yscale("log")
        row[0].set_title(f"{layer}: spectrum of the shared space, largest = 1", loc="left", fontsize=9)
        row[1].set_title(f"{layer}: consensus", loc="left", fontsize=9)
        row[1].set_ylim(0, 1.02)
        if experts > 1:
            row[1].axhline(experts**-0.5, color=INK, linewidth=0.9, linestyle=":")
            row[1].text(0.99, 0.03, "dotted: unrelated experts", transform=row[1].transAxes, ha="right", fontsize=7.5)
        for axis in row:
            axis.set_xlabel("direction", fontsize=8)
            grid(axis)
    legend_above(figure, panels[0, 0], len(merges))
    return Plot(
        figure, "Spectrum of the shared space and consensus of the experts along its directions, layer by layer."
    )


def layer_weights(report: dict) -> Plot | None:
    """Weight of each expert in each layer, one panel a merge."""
    merges = _layers_with(report, "weights")
    if not merges:
        return None
    experts = list(dict.fromkeys(e for found in merges.values() for layer in found.values() for e in layer["weights"]))
    figure, axes = row_of_axes(len(merges), height=2.5, sharey=True)
    for axis, (name, found) in zip(axes, merges.items()):
        for i, expert in enumerate(experts):
            heights = [number(layer["weights"].get(expert)) for layer in found.values()]
            x = np.arange(len(found)) + (i - (len(experts) - 1) / 2) * 0.8 / len(experts)
            axis.bar(x, heights, width=0.74 / len(experts), color=colour_of(i), label=expert)
        axis.axhline(1 / len(experts), color=INK, linewidth=0.9, linestyle=":")
        axis.set_xticks(range(len(found)), list(found), fontsize=8)
        axis.set_title(pretty(name), loc="left", fontsize=9)
        grid(axis, "y")
    axes[0].set_ylabel("weight (dotted: equal)", fontsize=8.5)
    legend_above(figure, axes[0], len(experts))
    return Plot(figure, f"Weights of the experts {', '.join(experts)} in each layer of each merge.")


def cosines(report: dict) -> Plot | None:
    """Cosines between the experts' updates, one panel a layer (the same for every merge: the first that has them)."""
    merges = _layers_with(report, "cosines")
    if not merges:
        return None
    name, layers = next(iter(merges.items()))
    experts = report["merges"][name]["experts"]
    size = max(len(found["cosines"]) for found in layers.values())
    width = min(WIDTH, (1.0 + 0.75 * size) * len(layers))
    figure, axes = row_of_axes(len(layers), height=0.42 * size + 1.3, width=width)
    for axis, (layer, found) in zip(axes, layers.items()):
        cosine_map(axis, found["cosines"], experts)
        axis.set_title(layer, loc="left", fontsize=9.5)
    return Plot(figure, "Cosines between the experts' updates in each layer.")


def tuning(report: dict) -> Plot | None:
    """Calibration loss over the tuned option, one line a method."""
    tuned = {name: t for name, t in report.get("tuned", {}).items() if t.get("values")}
    if not tuned:
        return None
    figure, (axis,) = row_of_axes(1, height=3.1)
    for i, (name, found) in enumerate(tuned.items()):
        losses = np.array([number(x) for x in found["loss"]])
        order = np.argsort(found["values"])
        values = np.array(found["values"], float)
        axis.plot(values[order], losses[order], ".-", color=colour_of(i), linewidth=1.4, label=pretty(name))
        if found.get("best") in found["values"]:
            best = found["values"].index(found["best"])
            axis.plot(values[best], losses[best], "o", color=colour_of(i), markersize=8, fillstyle="none")
    axis.set_xlabel(
        " / ".join(dict.fromkeys(t.get("option", "scale") for t in tuned.values())) + " (ring: chosen)", fontsize=8.5
    )
    axis.set_ylabel("calibration loss, nats a token", fontsize=8.5)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    grid(axis)
    return Plot(figure, f"Calibration loss over the scale of {', '.join(pretty(n) for n in tuned)}.")


PLOTS: dict[str, Callable[[dict], Plot | None]] = {
    "heatmap": heat_map,
    "comparisons": forest,
    "control": control,
    "training": training_curves,
    "spectra": spectra,
    "weights": layer_weights,
    "cosines": cosines,
    "tuning": tuning,
}


def draw(report: dict) -> Iterator[tuple[str, bytes, str]]:
    """Every figure that the report has numbers for: (name, PNG, alternative text)."""
    for name, plot in PLOTS.items():
        drawn = plot(report)
        if drawn is not None:
            yield name, png(drawn.figure), drawn.alt


def _layers_with(report: dict, key: str) -> dict[str, dict[str, dict]]:
    """merge -> layer -> diagnostics, of those that carry `key`."""
    merges = {name: {layer: found for layer, found in merge.get("layers", {}).items() if found.get(key)}
              for name, merge in report.get("merges", {}).items()}  # fmt: skip
    return {name: layers for name, layers in merges.items() if layers}


def _column_title(report: dict, column: str) -> str:
    if column == "trained":
        return "mean of\ntrained"
    unseen = report["domains"].get(column, {}).get("role") == "unseen"
    return f"{column}\n(unseen)" if unseen else column


def _from_best_to_worst(values: np.ndarray) -> np.ndarray:
    """Each column's values moved to 0 (its least) .. 1 (its largest); NaN stays."""
    filled = np.where(np.isfinite(values), values, np.inf)
    least = filled.min(0)
    largest = np.where(np.isfinite(values), values, -np.inf).max(0)
    return (values - least) / np.where(largest > least, largest - least, 1.0)


def _frame_column(axis: Axes, column: int, rows: int) -> None:
    axis.plot([column - 0.5, column + 0.5, column + 0.5, column - 0.5, column - 0.5],
              [-0.5, -0.5, rows - 0.5, rows - 0.5, -0.5], color=INK, linewidth=1.2, clip_on=False)  # fmt: skip


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about 5 % of the points around each one."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
