"""The report: self-contained page, valid JSON, honest sentences, whatever is missing or not finite."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pivotjax.errors import InputError
from pivotjax.evaluation.metrics import Outcome, compare, summarise
from pivotjax.evaluation.plots import cosines
from pivotjax.evaluation.report import headlines, verdicts, write_report

TRAINED, UNSEEN = ("emoji", "icons", "shapes"), "outlines"
LEVELS = {  # loss a token on emoji, icons, shapes, outlines: as first experiments showed them
    "w0": (7.2, 7.4, 6.6, 7.3),
    "expert:emoji": (3.9, 5.6, 5.1, 5.7),
    "expert:icons": (5.4, 4.1, 5.6, 4.7),
    "expert:shapes": (7.9, 8.2, 0.4, 8.3),
    "joint": (4.1, 4.3, 0.5, 4.8),
    "average": (5.9, 5.8, 4.9, 6.0),
    "task_arithmetic": (6.0, 6.0, 5.2, 6.1),
    "task_arithmetic:tuned": (5.7, 5.6, 4.7, 5.9),
    "ties": (6.1, 6.0, 5.0, 6.2),
    "ties:tuned": (5.9, 5.7, 4.6, 6.0),
    "regmean": (4.6, 4.7, 1.4, 5.1),
    "pivot": (5.8, 5.6, 4.6, 5.9),
    "pivot:tuned": (5.7, 5.6, 4.5, 5.9),
    "pivot:calibrated": (4.5, 4.68, 1.2, 5.0),
    "pivot:calibrated:tuned": (4.5, 4.66, 1.1, 5.0),
}


def synthetic_report(seeds: int = 1) -> dict:
    """A report as `pivotjax demo` makes it, from simulated items."""
    generator = np.random.default_rng(0)
    names = list(LEVELS)
    outcomes = [{d: _outcome(generator, column) for column, d in enumerate((*TRAINED, UNSEEN))} for _ in range(seeds)]
    return {
        "title": "PivotMerge on three domains: emoji, icons, shapes",
        "created": "2026-01-02 03:04",
        "command": "pivotjax demo --out runs/demo",
        "machine": {"platform": "cpu", "cores": 2, "memory_gb": 24.0},
        "versions": {"python": "3.11.9", "jax": "0.10.2", "pivotjax": "0.1.0"},
        "config": {"training": {"steps": 250, "learning_rate": 2e-3}, "data": {"domains": list(TRAINED)}},
        "seeds": list(range(seeds)),
        "wall_seconds": {"fetch": 12.0, "features": 210.5, "pretrain": 900.0, "merge": 61.0, "evaluate": 320.0},
        "notes": ["Scales were tuned on the calibration split."],
        "domains": {d: _domain(d) for d in (*TRAINED, UNSEEN)},
        "projectors": summarise(names, outcomes, TRAINED),
        "comparisons": compare(names, outcomes, TRAINED),
        "tuned": {m: _tuned(m) for m in ("task_arithmetic", "ties", "pivot", "pivot:calibrated")},
        "merges": {m: _merge(generator, m) for m in ("regmean", "pivot", "pivot:calibrated")},
        "training": {
            "experts": {"loss curves": {d: _curve(generator, LEVELS[f"expert:{d}"][i]) for i, d in enumerate(TRAINED)}},
            "joint": {"loss curves": {"joint": _curve(generator, 3.2)}},
            "diverged": [],
        },
        "samples": [
            _sample(d, c) for d, c in (("emoji", "french fries"), ("icons", "format paint"), ("shapes", "a red <b>"))
        ],
    }


def _outcome(generator, column: int, items: int = 48, control: int = 24) -> Outcome:
    tokens = generator.integers(3, 9, items)
    hardness = generator.normal(0, 0.8, items)
    own = np.stack([level[column] + hardness + generator.normal(0, 0.25, items) for level in LEVELS.values()])
    right = np.array([[min(0.95, 1.6 / level[column])] for level in LEVELS.values()])
    correct = (generator.uniform(size=own.shape) < right).astype(float)
    away = np.array([[0.9 * (7.3 - level[column]) / 7.3] for level in LEVELS.values()])
    shuffled = (own + away + generator.normal(0, 0.2, own.shape))[:, :control]
    return Outcome(
        own * tokens, tokens, correct, 24 if column == 2 else 8, shuffled * tokens[:control], tokens[:control]
    )


def _domain(name: str) -> dict:
    role = "unseen" if name == UNSEEN else "trained"
    counts = {"train": 1200, "calibration": 128, "test": 48, "choices": 24 if name == "shapes" else 8}
    attribution = (
        "Pictures by the OpenMoji project, https://openmoji.org/." if name == "emoji" else f"The {name} authors"
    )
    return {
        "role": role,
        **counts,
        "licence": "CC BY-SA 4.0",
        "attribution": attribution,
        "dropped": {"long caption": 31},
    }


def _tuned(method: str) -> dict:
    values = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4]
    bottom = 3.4 if "calibrated" in method else 5.2
    return {"option": "scale", "values": values, "loss": [bottom + (v - 0.75) ** 2 for v in values], "best": 0.7}


def _merge(generator, method: str) -> dict:
    def layer(rank):
        found = {"update_norms": {d: 20.0 + i for i, d in enumerate(TRAINED)}}
        found["cosines"] = [[1.0 if i == j else 0.05 * (i + j) - 0.03 for j in range(3)] for i in range(3)]
        if method != "regmean":
            found |= {
                "spectrum": np.exp(-np.arange(rank) / 30).tolist(),
                "energy_kept": 0.91,
                "rank": rank,
                "rescale": 1.0,
            }
            found["consensus"] = np.clip(generator.normal(0.58, 0.06, rank), 0, 1).tolist()
            found["weights"] = dict(zip(TRAINED, generator.dirichlet([9, 9, 9]).tolist()))
        return found

    options = {} if method == "regmean" else {"basis": "cross", "energy": 0.9, "scale": 1.0}
    return {
        "method": method.split(":")[0],
        "options": options,
        "experts": list(TRAINED),
        "layers": {"linear_0": layer(120), "linear_1": layer(90)},
    }


def _curve(generator, end: float) -> list[list[float]]:
    steps = np.arange(1, 251, 2)
    return np.stack(
        [steps, end + (7.5 - end) * np.exp(-steps / 40) + generator.normal(0, 0.15, steps.size)], 1
    ).tolist()


def _sample(domain: str, caption: str) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "#d9822b").save(buffer, "PNG")
    generated = {
        f"expert:{domain}" if domain != "icons" else "joint": "fries",
        "pivot:calibrated": "<script>x</script> fries",
    }
    image = base64.b64encode(buffer.getvalue()).decode()
    return {"domain": domain, "caption": caption, "image_png_base64": image, "generated": generated}


class _Page(HTMLParser):
    """What a browser would load, and whether the tags close."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.alts, self.tags, self.open, self.words = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.loads += [attrs[a] for a in ("src", "srcset", "poster", "data", "action") if a in attrs]
        self.loads += [attrs["href"]] if tag in ("link", "use", "image") else []
        self.alts += [attrs.get("alt")] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = synthetic_report()
    return report, folder, write_report(report, folder)


def test_page_loads_nothing(written):
    _, _, path = written
    text = path.read_text()
    page = _Page(text)
    assert page.open == []
    assert page.loads and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base"}
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert all(page.alts) and len(page.alts) == 8 + 3  # figures and samples


def test_page_shows_every_projector_domain_and_attribution(written):
    report, _, path = written
    words = " ".join(_Page(path.read_text()).words)
    for expected in ("W0 (start)", "expert: shapes", "TIES, tuned", "PivotMerge, calibrated, tuned", "outlines"):
        assert expected in words
    assert f"{report['projectors']['regmean']['icons']['loss']['mean']:.2f}" in words
    assert "CC BY-SA 4.0" in words and "https://openmoji.org/" in words and "pivotjax demo --out runs/demo" in words
    assert "<script>x</script> fries" in words and "a red <b>" in words  # escaped, shown as text


def test_json_and_figures(written):
    report, folder, _ = written
    found = json.loads((folder / "report.json").read_text())
    assert found["format"] == 1 and found["projectors"]["pivot:calibrated"] == report["projectors"]["pivot:calibrated"]
    for metric in ("loss", "retrieval"):
        assert {"mean", "low", "high", "n"} <= set(found["projectors"]["joint"]["trained"][metric])
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"heatmap", "comparisons", "control", "training", "spectra", "weights", "cosines", "tuning"}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 600 and np.asarray(image.convert("L")).std() > 5  # something is drawn


def test_cosines_bear_the_names_of_their_experts():
    """Whatever the order of the dicts in a report: JAX sorts them."""
    norms = {"a": 1.0, "b": 1.0, "c": 1.0}
    layers = {"linear_0": {"update_norms": norms, "cosines": [[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]]}}
    figure = cosines({"merges": {"ties": {"experts": ["c", "a", "b"], "layers": layers}}}).figure
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a", "b"]


def _said(report: dict) -> list[str]:
    return [" ".join([headline.text, *(words for _, words in headline.points)]) for headline in headlines(report)]


def test_sentences_follow_the_intervals(written):
    report, _, _ = written
    said = _said(report)
    assert said[0].startswith("On the trained domains PivotMerge, calibrated, tuned has a loss of 3.4")
    better, worse = said[0].split("Better than")[1].split("Worse than")
    assert "task arithmetic, tuned (" in better and "the best expert, emoji (" in better and "RegMean (" in better
    assert "joint training (" in worse and "W0" not in said[0]
    assert "task arithmetic (" not in said[0]  # the strongest form of a rival only
    assert said[1].startswith("On the trained domains PivotMerge, data-free, tuned")
    assert "joint training" in said[1].split("Worse than")[1]
    assert any(s.startswith("On outlines, which no projector was trained on, PivotMerge, calibrated") for s in said)
    assert any("Images are used" in s for s in said) and "One seed" in said[-1]


def test_a_lost_comparison_is_told(written):
    report = json.loads(json.dumps(written[0]))
    for row in report["comparisons"]:
        if row["a"] == "pivot:tuned" and row["metric"] == "loss":
            row["difference"] = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 144}
    assert {v.reading for v in verdicts(report) if v.a == "pivot:tuned"} == {"worse"}
    sentence = next(s for s in _said(report) if "trained domains PivotMerge, data-free" in s)
    assert "Better" not in sentence and "Worse than" in sentence and "(+0.50 [+0.20, +0.80])" in sentence


def test_missing_parts_and_diverged_projectors(tmp_path):
    path = write_report({"title": "nothing yet", "notes": ["a note"]}, tmp_path / "empty")
    assert "a note" in path.read_text()
    report = synthetic_report()
    for cell in (*report["projectors"]["pivot:tuned"].values(), *report["projectors"]["expert:icons"].values()):
        for value in cell.values():
            value.update(mean=float("nan"), low=float("nan"), high=float("nan"))
    for row in report["comparisons"]:
        if "pivot:tuned" in (row["a"], row["b"]) or row["b"] == "expert:icons":
            row["difference"].update(mean=float("nan"), low=float("nan"), high=float("nan"))
    report["training"]["experts"]["loss curves"]["icons"][40:] = [[81, float("nan")]]
    report["training"]["diverged"] = ["icons"]
    path = write_report(report, tmp_path / "diverged")
    page = _Page(path.read_text())
    words = " ".join(page.words)
    assert page.open == [] and "not finite: icons" in words and "no finite loss" in words and "nan" not in words.lower()
    assert (
        json.loads((path.parent / "report.json").read_text())["projectors"]["pivot:tuned"]["emoji"]["loss"]["mean"]
        is None
    )


def test_several_seeds_show_their_spread(tmp_path):
    report = synthetic_report(seeds=3)
    words = " ".join(_Page(write_report(report, tmp_path).read_text()).words)
    spread = report["projectors"]["joint"]["trained"]["loss"]["spread"]
    assert f"± {spread:.2f}" in words and "Mean of 3 seeds" in words


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_report(synthetic_report(), tmp_path / "file" / "report")
