"""The report of a run: `report.json` with every number, PNG figures, and one `report.html` that needs nothing else.

Format 1; every part may be missing. An estimate is {mean, low, high, n}, over several seeds also {seeds, spread}.

    title, created, command: str.  notes: [str].  seeds: [int].  machine, versions, config: {name: value}
    wall_seconds: {stage: seconds}
    domains: {domain: {role: "trained" | "unseen", train, calibration, test, choices: int, licence, attribution: str,
        dropped: {reason: count}}}
    projectors: {name: {domain or "trained": {loss, retrieval, shuffled_loss, image_gain: estimate}}}
    comparisons: [{a, b: name, domain, metric: "loss" | "retrieval", difference: estimate of a - b on the same items}]
    tuned: {method: {option, values: [float], loss: [float], best: float}}
    merges: {name: {method, options, experts: [str], layers: {layer: {update_norms, weights: {expert: float},
        cosines: [[float]] (rows and columns as `experts`), spectrum, consensus: [float], rank: int, energy_kept,
        rescale: float}}}}
    training: {experts, joint: {"loss curves": {name: [[step, loss]]}}, diverged: [name]}
    samples: [{domain, caption, image_png_base64: str, generated: {name: text}}]

Names of projectors: w0, expert:<domain>, joint, average, task_arithmetic, ties, regmean, pivot, pivot:calibrated, and
<method>:tuned where a scale was tuned.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pivotjax.evaluation import page, plots
from pivotjax.evaluation.plots import pretty
from pivotjax.files import output_folder, read_json, write_bytes, write_json
from pivotjax.pages.figures import number

FORMAT = 1


def write_report(report: dict, folder: Path) -> Path:
    """Writes `report.json`, one PNG a figure and the self-contained `report.html` into `folder`.

    Args:
        report: the numbers as the module's text describes them; what is missing is left out of the page.
        folder: made where needed.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = output_folder(Path(folder))
    write_json(folder / "report.json", {"format": FORMAT} | report)
    report = read_json(folder / "report.json")  # the page shows what the file holds and nothing else
    figures = {}
    for name, png, alt in plots.draw(report):
        write_bytes(folder / f"{name}.png", png)
        figures[name] = (png, alt)
    write_bytes(folder / "report.html", page.render(report, headlines(report), verdicts(report), figures).encode())
    return folder / "report.html"


@dataclass(frozen=True)
class Verdict:
    """One paired comparison of losses, read: `a` is better than, worse than, or not told apart from `b`."""

    a: str
    b: str
    domain: str
    difference: dict  # of a - b: mean, low, high, n

    @property
    def reading(self) -> str:
        """`better`, `worse`, `unclear` (the interval holds 0) or `missing` (one side has no number)."""
        low, high = number(self.difference["low"]), number(self.difference["high"])
        if math.isnan(low) or math.isnan(high):
            return "missing"
        return "better" if high < 0 else "worse" if low > 0 else "unclear"


def verdicts(report: dict, domain: str = "trained") -> list[Verdict]:
    """The report's paired comparisons of losses in one column."""
    rows = report.get("comparisons", [])
    chosen = [row for row in rows if row["metric"] == "loss" and row["domain"] == domain]
    return [Verdict(row["a"], row["b"], domain, row["difference"]) for row in chosen]


@dataclass(frozen=True)
class Headline:
    """A sentence for the top of the page, with a point for each reading of its comparisons."""

    text: str
    points: tuple[tuple[str, str], ...] = ()  # (reading, words)


def headlines(report: dict) -> list[Headline]:
    """What the numbers say, computed from them: did PivotMerge beat the others, on the trained and the unseen domains?

    A PivotMerge stands for its kind (calibrated, data-free) in its tuned form if there is one, whatever the test split
    says. It is held against the strongest form of every rival, chosen on the very numbers shown, which favours them.
    """
    projectors, domains = report.get("projectors", {}), report.get("domains", {})
    if not projectors:
        return []
    forms = (("pivot:calibrated:tuned", "pivot:calibrated"), ("pivot:tuned", "pivot"))
    pivots = [next(name for name in names if name in projectors) for names in forms if projectors.keys() & set(names)]
    unseen = [name for name, domain in domains.items() if domain.get("role") == "unseen"]
    found = [_against_rivals(report, name, domain) for domain in ("trained", *unseen) for name in pivots]
    return [*(f for f in found if f), *_images_used(report, pivots), _caution(report)]


def _against_rivals(report: dict, name: str, domain: str) -> Headline | None:
    """A projector's loss and retrieval in a column, and how its rivals compare."""
    cell = report["projectors"][name].get(domain)
    if not cell:
        return None
    where = "On the trained domains" if domain == "trained" else f"On {domain}, which no projector was trained on,"
    if math.isnan(number(cell["loss"]["mean"])):
        return Headline(f"{where} {pretty(name)} has no finite loss.")
    text = f"{where} {pretty(name)} has a loss of {_interval(cell['loss'])} nats a token"
    if "retrieval" in cell:
        text += f" and finds the right caption in {_interval(cell['retrieval'], percent=True)}"
    found = {v.b: v for v in verdicts(report, domain) if v.a == name}
    rivals = [found[b] for b in _strongest(report, domain) if b in found]
    points = []
    for reading, words in (("better", "Better than"), ("unclear", "Not told apart from"), ("worse", "Worse than")):
        chosen = [f"{_rival(v.b)} ({_signed(v.difference)})" for v in rivals if v.reading == reading]
        if chosen:
            points.append((reading, f"{words} {_listed(chosen)}."))
    return Headline(f"{text}.", tuple(points))


def _rival(name: str) -> str:
    return f"the best expert, {name.partition(':')[2]}" if name.startswith("expert:") else pretty(name)


def _strongest(report: dict, domain: str) -> list[str]:
    """The form with the lowest loss of every family that is not PivotMerge; W0 is nobody's rival."""
    best: dict[str, tuple[float, str]] = {}
    for name, row in report["projectors"].items():
        family = name.split(":")[0]
        loss = number(row.get(domain, {}).get("loss", {}).get("mean"))
        if family not in ("pivot", "w0") and not math.isnan(loss):
            best[family] = min(best.get(family, (math.inf, "")), (loss, name))
    return [name for _, name in sorted(best.values())]


def _images_used(report: dict, pivots: list[str]) -> list[Headline]:
    """The shuffled-image control of the first PivotMerge that has one."""
    for name in pivots:
        gain = report["projectors"][name].get("trained", {}).get("image_gain")
        if gain and not math.isnan(number(gain["low"])):
            reading = "Images are used" if gain["low"] > 0 else "It is not shown that images are used"
            text = (
                f"{reading}: another item's image raises the loss of {pretty(name)} by {_interval(gain)} nats a token."
            )
            return [Headline(text)]
    return []


def _caution(report: dict) -> Headline:
    seeds = len(report.get("seeds", []))
    if seeds > 1:
        return Headline(
            f"Mean of {seeds} seeds; the intervals (95 %) speak of the test items, the spread of the seeds."
        )
    return Headline("One seed: the intervals (95 %) speak of the test items only, not of another training run.")


def _interval(value: dict, percent: bool = False) -> str:
    mean, low, high = (number(value[key]) for key in ("mean", "low", "high"))
    if percent:
        return f"{100 * mean:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _signed(value: dict) -> str:
    return f"{number(value['mean']):+.2f} [{number(value['low']):+.2f}, {number(value['high']):+.2f}]".replace("-", "−")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
