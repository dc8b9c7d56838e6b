"""The page of a merge: self-contained, for brief and full reports, one or many layers, one to sixteen experts."""

import base64
import io
import json
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image
from small_world import make_world, random_params

import pivotjax
from pivotjax.errors import InputError
from pivotjax.merging import page, plots

FULL = {"sizes", "cosines", "spectra", "overlap", "consensus", "conflicts", "distances"}


class Page(HTMLParser):
    """What a browser would load, and whether the tags close."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.alts, self.tags, self.open, self.words = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.loads += [attrs[a] for a in ("src", "srcset", "data", "action") if a in attrs]
        self.loads += [attrs["href"]] if tag in ("link", "use", "image") else []
        self.alts += [attrs.get("alt")] if tag == "img" else []
        self.open += [tag] if tag not in ("meta", "img", "br", "link", "hr") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())


def written(tmp_path, report):
    """The page of a report that went through JSON, checked to be whole; and what it says."""
    path = page.write(tmp_path, json.loads(json.dumps(report, allow_nan=False)))
    assert path == tmp_path / "merge_report.html"
    found = Page(path.read_text())
    assert found.open == [] and not found.tags & {"script", "iframe", "object", "embed", "link", "base"}
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    assert all(found.alts) and "nan" not in found.said.lower().split()
    for load in found.loads:
        kind, data = load.split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert 300 < picture.width < 2500 and np.asarray(picture.convert("L")).std() > 5  # something is drawn
    return found


def drawn(report):
    return {name for name, _, _ in plots.draw(report)}


def full(base, experts, method="pivot", **options):
    return pivotjax.merge(base, experts, method, diagnose="full", **options).report


def deep(layers, experts):
    """Many blocks of two layers, and an embedding that is in no block."""
    rng = np.random.default_rng(0)

    def model():
        blocks = {f"model.layers.{i}.{kind}.weight": rng.normal(size=(rows, 8)).astype(np.float32)
                  for i in range(layers) for kind, rows in (("query", 9), ("up", 10))}  # fmt: skip
        return blocks | {"model.embed.weight": rng.normal(size=(12, 8)).astype(np.float32)}

    return model(), {f"runs/{k}/a-long-name-of-expert-{k}": model() for k in range(experts)}


def test_full_report_of_a_projector(world, tmp_path):
    report = full(world.base, world.experts, energy=0.8)
    assert drawn(report) == FULL | {"weights"}
    extra = {
        "title": "a <b>title</b>",
        "created": "2026-01-02",
        "notes": ["dtypes <differ>"],
        "inputs": {"emoji": {"path": "runs/emoji", "sha256": {"model.safetensors": "ab" * 32}}},
        "measured_from": "mean",
        "left_as_in_base": ["lm_head.weight"],
        "versions": {"jax": "0.10.2"},
        "recipe": {"merge_method": "pivot"},
    }
    found = written(tmp_path, report | extra)
    assert len(found.loads) == len(FULL) + 1
    for words in ("a <b>title</b>", "dtypes <differ>", "model.safetensors: ababababab", "measured from: mean",
                  "lm_head.weight left as in the base", "energy 0.8 0.9", "jax 0.10.2", "linear_2 6 × 7"):  # fmt: skip
        assert words in found.said, words
    assert "<b>title" not in (tmp_path / page.NAME).read_text()


def test_brief_report(world, tmp_path):
    report = pivotjax.merge(world.base, world.experts, "average").report
    assert drawn(report) == {"sizes", "cosines"}
    found = written(tmp_path, report)
    assert "Cosines between the experts' updates" in found.said and "What the experts share" not in found.said


def test_report_without_diagnostics(world, tmp_path):
    report = pivotjax.merge(world.base, world.experts, "average", diagnose="nothing").report
    assert drawn(report) == set()
    assert "Mean of the experts" in written(tmp_path, report).said


def test_one_expert(tmp_path):
    world = make_world(count=1)
    report = full(world.base, world.experts, "task_arithmetic")
    assert drawn(report) == FULL - {"overlap", "consensus", "conflicts"}
    assert "a merge of emoji" in written(tmp_path, report).said


@pytest.mark.parametrize("layers, experts", [(1, 16), (3, 3), (60, 2)])
def test_many_layers_and_experts(tmp_path, layers, experts):
    """Depth curves instead of a panel a layer; long tables and lists fold."""
    base, named = deep(layers, experts)
    report = full(base, named, "task_arithmetic") | {"exceptions": {f"norm.{i}": "averaged" for i in range(2 * layers)}}
    blocks = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in ("query", "up")]
    assert list(report["layers"]) == ["model.embed", *sorted(blocks, key=lambda name: (int(name.split(".")[2]), name))]
    assert drawn(report) == (FULL if layers == 1 else FULL - {"spectra"})
    found = written(tmp_path, report)
    assert f"model.layers.{layers - 1}.up" in found.said and ("details" in found.tags) == (layers > 1 or experts > 12)
    assert (tmp_path / page.NAME).stat().st_size < 3_000_000


def test_experts_keep_their_order_and_cosines_their_names():
    """Two experts that are one, and one unlike them, named so that their order is not that of the alphabet."""
    rng = np.random.default_rng(0)
    base, same, other = (random_params(rng) for _ in range(3))
    report = full(base, {"z": same, "a": other, "c": same}, "task_arithmetic")
    assert report["experts"] == ["z", "a", "c"]
    for facts in report["layers"].values():
        assert list(facts["update_norms"]) == ["z", "a", "c"] and list(facts["merge"]["cosine"]) == ["z", "a", "c"]
        assert facts["cosines"][0][2] == pytest.approx(1, abs=1e-5) and abs(facts["cosines"][0][1]) < 0.9
    report = json.loads(json.dumps(report, sort_keys=True))  # as any tool may write it again
    axis = plots.cosines(report).figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    table = np.array(axis.images[0].get_array())
    assert sorted(names[:3]) == ["a", "c", "z"] and table[names.index("z"), names.index("c")] > 0.99
    assert abs(table[names.index("z"), names.index("a")]) < 0.9


def test_headlines_say_what_the_numbers_say():
    base = random_params(np.random.default_rng(0))
    move = random_params(np.random.default_rng(1))

    def moved(factor):
        return jax.tree.map(lambda b, m: b + np.float32(factor) * m, base, move)

    said = page.headlines(full(base, {"near": moved(1), "far": moved(3)}, "task_arithmetic", scale=0.3))
    assert said[0] == "Cosines between the experts' updates: 1.00."
    assert said[1] == "Consensus along the leading shared directions: 1.00; unrelated experts would have 0.71."
    # 0.3 (1 + 3) = 1.2 of the shorter one; the two are 2 long on average.
    assert said[2] == "The merged update is 0.60 times as long as an expert's on average."
    assert said[3] == "Nearest to it is near, at 0.20 of that expert's length."


def test_missing_numbers_and_words_that_are_html(world, tmp_path):
    report = full(world.base, {f"<i>{name}": expert for name, expert in world.experts.items()})
    facts = report["layers"]["linear_0"]
    facts["cosines"][0][1] = facts["merge"]["norm"] = facts["sign_conflicts"]["share"] = None
    facts["update_norms"] = dict.fromkeys(facts["update_norms"])
    facts["merge"]["distance"] = dict.fromkeys(facts["merge"]["distance"])
    facts["shared_directions"]["consensus"][0] = facts["subspace_overlap"]["left"]["<i>emoji & <i>icons"][0] = None
    found = written(tmp_path, report)
    assert "<i>emoji" in found.said and "i" not in found.tags


def test_folder_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        page.write(tmp_path / "file" / "report", full(world.base, world.experts))
