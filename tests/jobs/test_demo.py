"""`pivotjax demo --quick`, once for all checks: killed while it trains, started again, looked at from all sides."""

import json
import signal
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from processes import ROOT, run
from safetensors.torch import load_file

from pivotjax.checkpoints import store
from pivotjax.models import projector

pytestmark = [pytest.mark.slow, pytest.mark.assets]
TRAINED, UNSEEN = ("emoji", "icons", "shapes"), "outlines"
NAMES = {"w0", "joint", "average", "task_arithmetic", "ties", "regmean", "pivot", "pivot:calibrated"} | {
    f"expert:{domain}" for domain in TRAINED
}
TUNED = {"task_arithmetic", "ties", "pivot"}  # at least
PACKAGES = (
    "smollm2-135m", "efficientnet-lite0", "openmoji", "emoji-names", "material-icons", "easy-vqa", "tabler-icons"
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """The demo's folder, and three runs: killed after the first training checkpoint; to the end; once more."""
    assets(*PACKAGES)
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "out"
    demo = ("demo", "--quick", "--out", out)
    checkpoint = out / "seed-0" / "experts" / "training" / "2"
    killed = run(*demo, log=folder / "killed.log", until=checkpoint, stop=signal.SIGTERM)
    left = sorted(path.name for path in (out / "seed-0" / "experts").iterdir())
    finished = run(*demo, log=folder / "finished.log")
    again = run(*demo, log=folder / "again.log")
    return out, killed, left, finished, again


@pytest.fixture(scope="module")
def report(runs):
    return json.loads((runs[0] / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_killed_it_leaves_no_half_of_anything(runs):
    _, killed, left, _, _ = runs
    assert killed.status == 143 and "Traceback" not in killed.err, killed.err
    assert left == ["checkpoints.json", "config.yaml", "metrics.jsonl", "training"]


def test_started_again_it_goes_on_and_finishes(runs):
    out, killed, _, finished, _ = runs
    assert finished.status == 0, finished.err
    assert "going on from step" in finished.err and "Traceback" not in finished.err and "Warning" not in finished.err
    assert "expected: about" in killed.err.splitlines()[0] and "minutes on 2 cores" in killed.err.splitlines()[0]
    assert f"report: {out / 'report.html'}" in finished.err


def test_finished_it_says_so_in_seconds(runs):
    _, _, _, finished, again = runs
    assert again.status == 0 and again.seconds < min(60, finished.seconds / 2)
    for stage in ("experts", "joint", "merge", "evaluate", "report", "export"):
        assert f"{stage} is finished" in again.err


def test_report_names_every_projector_with_every_number(report):
    named = set(report["projectors"])
    assert named >= NAMES | {f"{name}:tuned" for name in TUNED}
    assert all(name.removesuffix(":tuned") in NAMES for name in named)
    for name, domains in report["projectors"].items():
        assert set(domains) >= {*TRAINED, UNSEEN, "trained"}, name
        for domain, metrics in domains.items():
            for metric in ("loss", "retrieval"):
                found = metrics[metric]
                assert {"mean", "low", "high", "n"} <= set(found)
                assert found["low"] <= found["mean"] <= found["high"] and found["n"] > 0, (name, domain, metric)
            assert 0 <= metrics["retrieval"]["mean"] <= 1
            assert metrics["shuffled_loss"]["n"] > 0
    assert report["domains"][UNSEEN]["role"] == "unseen"
    assert all(report["domains"][name]["role"] == "trained" for name in TRAINED)


def test_report_tells_how_it_came_about(report):
    for key in ("config", "versions", "wall_seconds", "machine", "training", "merges", "tuned", "samples", "notes"):
        assert report[key], key
    assert report["seeds"] == [0] and report["config"]["quick"] is True
    assert {f"{name}:tuned" for name in report["tuned"]} <= set(report["projectors"])
    assert all(sample["generated"] for sample in report["samples"])
    curves = report["training"]["experts"]["loss curves"]
    assert set(curves) == set(TRAINED) and all(curve[-1][0] == report["config"]["steps"] for curve in curves.values())
    assert len(report["training"]["joint"]["loss curves"]["joint"]) == len(curves["shapes"])
    # Twelve steps are enough to learn the easiest domain; of the others they are so few that rounding decides.
    shapes = [loss for _, loss in curves["shapes"]]
    assert sum(shapes[-3:]) / 3 < shapes[0] - 1


class Resources(HTMLParser):
    """Everything that a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        loads = {"src", "srcset", "data", "poster"} | ({"href"} if tag == "link" else set())
        self.found += [value for key, value in attrs if key in loads]


def test_page_loads_nothing(runs):
    page = (runs[0] / "report.html").read_text()
    resources = Resources()
    resources.feed(page)
    assert resources.found and all(value.startswith("data:") for value in resources.found)
    assert "@import" not in page and "url(http" not in page and "url(//" not in page


def test_export_runs_in_torch(runs):
    out = runs[0]
    tensors = load_file(out / "export" / "mm_projector.safetensors")
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sizes["model.mm_projector.0.weight"] == (576, 1280) and sizes["model.mm_projector.2.weight"] == (576, 576)
    network = torch.nn.Sequential(torch.nn.Linear(1280, 576), torch.nn.GELU(), torch.nn.Linear(576, 576))
    network.load_state_dict({name.removeprefix("model.mm_projector."): tensor for name, tensor in tensors.items()})
    merged = store.load_projector(out / "seed-0" / "merges" / "pivot:calibrated" / "projector")
    features = np.random.default_rng(0).normal(size=(2, 16, 1280)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(projector.apply(merged.params, features), expected, rtol=1e-5, atol=1e-5)


def test_checkpoints_say_where_they_come_from(runs):
    saved = runs[0] / "seed-0"
    w0 = store.load_projector(saved / "experts" / "projectors" / "w0").info
    experts = {name: store.load_projector(saved / "experts" / "projectors" / name).info for name in TRAINED}
    joint = store.load_projector(saved / "joint" / "projectors" / "joint").info
    merged = store.load_projector(saved / "merges" / "pivot" / "projector").info
    assert {one["init_id"] for one in (w0, joint, merged, *experts.values())} == {w0["fingerprint"]}
    assert merged["merged_from"] == {name: one["fingerprint"] for name, one in ({"base": w0} | experts).items()}
    assert all(one["config"] and one["versions"] and one["backbone"] for one in (w0, joint, merged, *experts.values()))


@pytest.mark.parametrize("model", ["export/mm_projector.safetensors", "seed-0/merges/pivot/projector"])
def test_generate_captions_a_picture(command, runs, tmp_path, model):
    picture = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 60, 50), fill="red")
    picture.save(tmp_path / "picture.png")
    first = command("generate", tmp_path / "picture.png", "--model", runs[0] / model, "--max-new", 6)
    assert first.status == 0 and first.out.endswith("\n") and first.err == ""
    prompted = command("generate", tmp_path / "picture.png", "\nA red", "--model", runs[0] / model, "--max-new", 6)
    assert prompted.status == 0 and prompted.out.strip()


def test_recipes_run_on_the_experts(command, runs, report, tmp_path, monkeypatch):
    """merge/pivot.yaml and eval/mini.yaml as shipped, with train/mini.yaml's output replaced by the demo's."""
    (tmp_path / "runs/mini").mkdir(parents=True)
    (tmp_path / "runs/mini/pretrain").symlink_to(runs[0] / "seed-0" / "experts")
    monkeypatch.chdir(tmp_path)
    small = ("--calibration.images", 8, "--calibration.captions", 2)
    assert command("merge", ROOT / "merge/pivot.yaml", *small).status == 0
    assert command("merge", ROOT / "merge/ties.yaml", *small).status == 0
    tuned = json.loads((tmp_path / "runs/mini/ties/merge_report.json").read_text())["tuned"]
    assert tuned["best"] in tuned["values"] and len(tuned["loss"]) == len(tuned["values"])
    ended = command(
        "evaluate", ROOT / "eval/mini.yaml", "--items", 4, "--measure.control-items", 2, "--measure.resamples", 50
    )
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "runs/mini/evaluation/report.json").read_text())
    assert set(found["projectors"]) == {"w0", *(f"expert:{name}" for name in TRAINED), "pivot:calibrated"}
    assert found["projectors"]["w0"][UNSEEN]["retrieval"]["n"] == 4
    assert (tmp_path / "runs/mini/evaluation/report.html").stat().st_size > 10_000
