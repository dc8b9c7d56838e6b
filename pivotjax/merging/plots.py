"""The figures of a merge's report. Each function takes the report and returns a Plot, or None where the report holds
nothing to draw. A few layers get a panel each; many become curves over depth: the mean over the layers of a block
(query, key, up, ...), and the range that they span."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pivotjax.pages.figures import (
    AROUND_ZERO,
    INK,
    SERIES,
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

_FEW = 4  # layers that get a panel each
_PAIRS = 6  # pairs of experts that get a line each
_MERGE = "the merge"


def sizes(report: dict) -> Plot | None:
    """Norm and effective rank of the updates and of the merge."""
    norms = {label: _with_merge(facts, "update_norms", "norm") for label, facts in _with(report, "update_norms")}
    ranks = {label: _with_merge(facts, "effective_rank", "effective_rank")
             for label, facts in _with(report, "effective_rank")}  # fmt: skip
    panels = {"norm of the update": norms, "effective rank": ranks}
    return _by_expert({title: values for title, values in panels.items() if values},
                      "Norms and effective ranks of the experts' updates and of the merged one, a layer.")  # fmt: skip


def cosines(report: dict) -> Plot | None:
    """Cosines between the updates, and of the merged update to each."""
    layers = {label: _cosines_with_merge(facts, report["experts"]) for label, facts in _with(report, "cosines")}
    if not layers:
        return None
    alt = "Cosines between the experts' updates, and of the merged update to each of them, a layer."
    if len(layers) <= _FEW:
        size = max(len(names) for names, _ in layers.values())
        figure, axes = _panels(len(layers), height=0.42 * size + 1.0, width=1.4 + 0.75 * size)
        for axis, (label, (names, values)) in zip(axes, layers.items()):
            cosine_map(axis, values, [_short(name) for name in names])
            axis.set_title(label, loc="left", fontsize=9.5)
        return Plot(figure, alt)
    experts = len(report["experts"])
    figure, (axis,) = row_of_axes(1, height=2.7)
    drawn = {label: _off_diagonal(np.array(values, float)[:experts, :experts]) for label, (_, values) in layers.items()}
    if experts > 1:
        _depth_curve(axis, drawn, colour_of(0), "between experts")
    merge = {label: np.array(values[-1][:-1], float) for label, (names, values) in layers.items() if _MERGE in names}
    if merge:
        _depth_curve(axis, merge, INK, "of the merge to the experts")
    axis.set_ylabel("cosine", fontsize=8.5)
    axis.legend(frameon=False, fontsize=8)
    return Plot(figure, alt)


def spectra(report: dict) -> Plot | None:
    """Leading singular values of the updates and of the merge, a panel a layer."""
    layers = dict(_with(report, "singular_values"))
    if not layers or len(layers) > _FEW:
        return None
    figure, axes = _panels(len(layers), height=2.9)
    for axis, (label, facts) in zip(axes, layers.items()):
        curves = {**facts["singular_values"], _MERGE: facts.get("merge", {}).get("singular_values", [])}
        for i, (name, values) in enumerate(curves.items()):
            found = np.array([number(v) for v in values])
            found = np.where(found > 0, found, np.nan)
            style = {"color": INK, "linewidth": 2.2} if name == _MERGE else _style(i)
            axis.plot(np.arange(1, len(found) + 1), found, label=_short(name), **style)
        _log_scale(axis)
        axis.set_title(label, loc="left", fontsize=9.5)
        axis.set_xlabel("direction", fontsize=8.5)
        grid(axis)
    axes[0].set_ylabel("singular value", fontsize=8.5)
    legend_above(figure, axes[0], len(report["experts"]) + 1)
    return Plot(figure, "Leading singular values of each expert's update and of the merged update, a layer.")


def overlap(report: dict) -> Plot | None:
    """Principal angles between the experts' leading subspaces."""
    layers = {label: facts for label, facts in _with(report, "subspace_overlap") if facts["subspace_overlap"]["left"]}
    if not layers:
        return None
    alt = "Cosines of the principal angles between the experts' leading singular subspaces, outputs and inputs."
    sides = {"left": "outputs (left)", "right": "inputs (right)"}
    if len(layers) > _FEW:
        figure, axes = row_of_axes(2, height=2.7, sharey=True)
        for axis, (side, title) in zip(axes, sides.items()):
            drawn = {label: [_rms(curve) for curve in facts["subspace_overlap"][side].values()]
                     for label, facts in layers.items()}  # fmt: skip
            _depth_curve(axis, drawn, colour_of(0), "pairs of experts")
            chance = {label: [_chance(facts, side)] for label, facts in layers.items() if "shape" in facts}
            _depth_curve(axis, chance, INK, "random spaces", linestyle=":")
            axis.set_title(title, loc="left", fontsize=9.5)
        axes[0].set_ylabel("root mean square cosine", fontsize=8.5)
        axes[0].set_ylim(0, 1.02)
        legend_above(figure, axes[0], 2)
        return Plot(figure, alt)
    figure = blank(height=2.3 * len(layers) + 0.4)
    rows = figure.subplots(len(layers), 2, squeeze=False, sharey=True)
    for row, (label, facts) in zip(rows, layers.items()):
        for axis, (side, title) in zip(row, sides.items()):
            _overlap_curves(axis, facts["subspace_overlap"][side])
            if "shape" in facts:
                axis.axhline(_chance(facts, side), color=INK, linewidth=1.2, linestyle=":")
            axis.set_title(f"{label}: {title}", loc="left", fontsize=9.5)
            axis.set_ylim(0, 1.02)
            grid(axis)
        row[0].set_ylabel("cosine", fontsize=8.5)
    for axis in rows[-1]:
        axis.set_xlabel("principal angle", fontsize=8.5)
    legend_above(figure, rows[0, 0], _PAIRS)
    return Plot(figure, alt)


def consensus(report: dict) -> Plot | None:
    """Consensus along the directions of the joint energy space."""
    layers = dict(_with(report, "shared_directions"))
    experts = len(report["experts"])
    if not layers or experts < 2:
        return None
    alt = "Consensus of the experts along the leading directions of their joint energy space."
    if len(layers) <= _FEW:
        figure, axes = _panels(len(layers), height=2.5, sharey=True)
        for axis, (label, facts) in zip(axes, layers.items()):
            values = [number(v) for v in facts["shared_directions"]["consensus"]]
            axis.plot(range(1, len(values) + 1), values, ".-", color=colour_of(0), linewidth=0.9, markersize=4)
            axis.set_title(label, loc="left", fontsize=9.5)
            axis.set_xlabel("direction, largest first", fontsize=8.5)
    else:
        figure, axes = row_of_axes(1, height=2.5)
        _depth_curve(axes[0], {label: [_mean_consensus(facts)] for label, facts in layers.items()}, colour_of(0), "")
    for axis in axes:
        axis.axhline(experts**-0.5, color=INK, linewidth=0.9, linestyle=":")
        axis.text(0.99, 0.03, "dotted: unrelated experts", transform=axis.transAxes, ha="right", fontsize=7.5)
        axis.set_ylim(0, 1.04)
        grid(axis)
    axes[0].set_ylabel("consensus", fontsize=8.5)
    return Plot(figure, alt)


def conflicts(report: dict) -> Plot | None:
    """How often, and with how much of their magnitude, experts' signs differ."""
    layers, experts = dict(_with(report, "sign_conflicts")), list(report["experts"])
    if not layers or len(experts) < 2:
        return None
    alt = "Share of entries in which the experts' signs differ, by pairs and overall."
    if len(layers) > _FEW:
        figure, (axis,) = row_of_axes(1, height=2.5)
        for i, (key, name) in enumerate((("share", "of entries"), ("weighted", "of magnitude"))):
            drawn = {label: [facts["sign_conflicts"][key]] for label, facts in layers.items()}
            _depth_curve(axis, drawn, colour_of(i), name)
        axis.axhline(1 - 2.0 ** (1 - len(experts)), color=INK, linewidth=0.9, linestyle=":", label="unrelated experts")
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("share with both signs", fontsize=8.5)
        axis.legend(frameon=False, fontsize=8)
        return Plot(figure, alt)
    figure, axes = _panels(len(layers), height=0.42 * len(experts) + 1.4, width=1.6 + 0.75 * len(experts))
    for axis, (label, facts) in zip(axes, layers.items()):
        found = facts["sign_conflicts"]
        share, weighted = (np.array(found[key], float) for key in ("pairs", "weighted_pairs"))
        _conflict_map(axis, np.tril(share) + np.triu(weighted), [_short(name) for name in experts])
        share, weighted = (f"{100 * number(found[key]):.0f} % of" for key in ("share", "weighted"))
        axis.set_title(f"{label}: {share} entries,\n{weighted} magnitude", loc="left", fontsize=9)
    return Plot(figure, alt)


def distances(report: dict) -> Plot | None:
    """How far the merge is from each expert."""
    values = {label: facts["merge"]["distance"] for label, facts in _with(report, "merge")}
    panels = {"distance of the merge to each expert": values}
    return _by_expert(panels if values else {}, "Relative distance of the merged update to each expert's, a layer.")


def weights(report: dict) -> Plot | None:
    """Layer weights, and the energy that the filter kept, of methods that have them."""
    panels = {}
    for key, title in (("weights", "weight in the layer"), ("energy_kept_by_expert", "share of energy kept")):
        values = {label: facts[key] for label, facts in _with(report, key) if isinstance(facts[key], Mapping)}
        if values:
            panels[title] = values
    return _by_expert(panels, "Weight of each expert in each layer, and the share of its energy that the filter kept.")


PLOTS: dict[str, Callable[[dict], Plot | None]] = {
    "sizes": sizes,
    "cosines": cosines,
    "spectra": spectra,
    "overlap": overlap,
    "consensus": consensus,
    "conflicts": conflicts,
    "distances": distances,
    "weights": weights,
}


def draw(report: dict) -> Iterator[tuple[str, bytes, str]]:
    """Every figure that the report has numbers for: (name, PNG, alternative text)."""
    for name, plot in PLOTS.items():
        drawn = plot(report)
        if drawn is not None:
            yield name, png(drawn.figure), drawn.alt


def _with(report: dict, key: str) -> list[tuple[str, dict]]:
    """(layer, facts) of those that carry `key`."""
    return [(label, facts) for label, facts in report.get("layers", {}).items() if facts.get(key)]


def _with_merge(facts: dict, key: str, merge_key: str) -> dict[str, Any]:
    merged = facts.get("merge", {}).get(merge_key)
    return facts[key] if merged is None else {**facts[key], _MERGE: merged}


def _cosines_with_merge(facts: dict, experts: list[str]) -> tuple[list[str], list[list[float]]]:
    """Names and the table of cosines, with a last row and column of the merge where the report has it."""
    table = [[number(v) for v in row] for row in facts["cosines"]]
    if "merge" not in facts:
        return experts, table
    own = [number(facts["merge"]["cosine"][name]) for name in experts]
    return [*experts, _MERGE], [*([*row, c] for row, c in zip(table, own)), [*own, 1.0]]


def _by_expert(panels: Mapping[str, Mapping[str, Mapping[str, float]]], alt: str) -> Plot | None:
    """Panels `{title: {layer: {expert: value}}}`: bars a layer, or curves over depth."""
    if not panels:
        return None
    series = max(len(values) for layers in panels.values() for values in layers.values())
    figure, axes = row_of_axes(len(panels), height=2.4 + 0.17 * -(-series // 4))
    for axis, (title, layers) in zip(axes, panels.items()):
        names = list(dict.fromkeys(name for values in layers.values() for name in values))
        for i, name in enumerate(names):
            values = {label: found.get(name) for label, found in layers.items()}
            style = {"color": INK} if name == _MERGE else _style(i)
            if len(layers) <= _FEW:
                x = np.arange(len(layers)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
                heights = [number(value) for value in values.values()]
                axis.bar(x, heights, width=0.74 / len(names), color=style["color"], label=_short(name))
            else:
                _depth_curve(axis, {label: [value] for label, value in values.items()}, label=_short(name), **style)
        if len(layers) <= _FEW:
            axis.set_xticks(range(len(layers)), [_short(label, 24) for label in layers], fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_title(title, loc="left", fontsize=9.5)
        grid(axis, "y")
    most = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[0]))
    legend_above(figure, most, 6)
    return Plot(figure, alt)


def _depth_curve(
    axis: Axes, values: Mapping[str, Sequence[float | None]], color: str, label: str, linestyle: str = "-"
) -> None:
    """Mean and range of the values `{layer: numbers}` at each depth."""
    blocks: dict[int, list[float]] = {}
    for depth, found in zip(_depths(list(values)), values.values()):
        if depth is not None:
            blocks.setdefault(depth, []).extend(v for v in map(number, found) if np.isfinite(v))
    blocks = {depth: np.array(found) for depth, found in sorted(blocks.items()) if found}
    mean, low, high = ([f(found) for found in blocks.values()] for f in (np.mean, np.min, np.max))
    axis.plot(list(blocks), mean, color=color, linewidth=1.5, linestyle=linestyle, label=label)
    if low != high:
        axis.fill_between(list(blocks), low, high, color=color, alpha=0.12, linewidth=0)
    axis.set_xlabel("depth", fontsize=8.5)
    grid(axis)


def _log_scale(axis: Axes) -> None:
    """Logarithmic, with plain numbers, three a decade where there are few decades."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _depths(labels: Sequence[str]) -> list[int | None]:
    """Which block each layer belongs to, by the first number in its name (without one: None, it is no block's; where no
    layer has one: its place)."""
    found = [re.search(r"\d+", label) for label in labels]
    return [int(match[0]) if match else None for match in found] if any(found) else list(range(len(labels)))


def _panels(count: int, height: float, width: float = WIDTH, **options: Any) -> tuple[Figure, list[Axes]]:
    """A panel a layer, side by side as far as `width` each allows."""
    return row_of_axes(count, height, min(WIDTH, width * count), **options)


def _style(i: int) -> dict[str, Any]:
    """Colour and, where colours come again, another line."""
    return {"color": colour_of(i), "linestyle": ("-", "--")[i // len(SERIES) % 2]}


def _short(name: str, length: int = 16) -> str:
    """The end of a name that is long: there paths differ."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _off_diagonal(table: np.ndarray) -> np.ndarray:
    return table[np.triu_indices(len(table), 1)]


def _rms(values: Sequence[float | None]) -> float:
    return float(np.sqrt(np.mean(np.square([number(v) for v in values]))))


def _chance(facts: dict, side: str) -> float:
    """Root mean square cosine between random spaces of as many directions: `sqrt(q / d)`."""
    directions = len(next(iter(facts["subspace_overlap"][side].values())))
    return float(np.sqrt(directions / facts["shape"][side == "right"]))


def _overlap_curves(axis: Axes, pairs: Mapping[str, Sequence[float | None]]) -> None:
    """A line a pair; of many pairs their mean and range."""
    curves = np.array([[number(v) for v in curve] for curve in pairs.values()])
    x = np.arange(1, curves.shape[1] + 1)
    if len(curves) <= _PAIRS:
        for i, (name, curve) in enumerate(zip(pairs, curves)):
            axis.plot(x, curve, label=_short(name, 24), marker="." if len(x) < 3 else None, **_style(i))
        return
    axis.plot(x, curves.mean(0), color=colour_of(0), label=f"mean of {len(curves)} pairs")
    axis.fill_between(x, curves.min(0), curves.max(0), color=colour_of(0), alpha=0.15, linewidth=0, label="range")


def _mean_consensus(facts: dict) -> float:
    """Consensus over the directions, each weighted by its energy."""
    found = facts["shared_directions"]
    energy = np.square([number(v) for v in found["singular_values"]])
    return float(energy @ np.array([number(v) for v in found["consensus"]]) / max(energy.sum(), 1e-30))


def _conflict_map(axis: Axes, values: np.ndarray, names: list[str]) -> None:
    """Below the diagonal shares of entries, above it of magnitude; white at one half, where signs are unrelated."""
    shown = np.ma.masked_array(values, np.eye(len(names), dtype=bool))
    axis.imshow(shown, cmap=AROUND_ZERO.reversed(), vmin=0, vmax=1, aspect="auto")
    if len(names) <= 10:
        for (row, column), value in np.ndenumerate(values):
            if row != column:
                axis.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", fontsize=8, color=INK)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
