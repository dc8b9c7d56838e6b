"""`pivotjax sweep` through the command line, with a stand-in for the frozen models: a projector's loss is how far it
lies from one that the calibration domains want."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_projectors import tiny

import pivotjax
from pivotjax.checkpoints import store
from pivotjax.jobs import calibration

WANTED = {"cats": 1, "dogs": 2, "both": 3}  # domain -> seed of the projector that it wants


class Pairs:
    """Calibration data of some domains."""

    def __init__(self, sources, config=None):
        self.sources, self.config = sources, config

    def loss(self, params):
        wanted = [tiny(WANTED[domain]) for own in self.sources for domain in own]
        total = jnp.zeros(jax.tree.leaves(params)[0].shape[0])
        for one in wanted:
            for leaf, aim in zip(jax.tree.leaves(params), jax.tree.leaves(one)):
                total += jnp.square(leaf - aim).reshape(len(leaf), -1).mean(-1)
        return total / len(wanted)

    def grams(self, params):
        sizes = {name: layer["kernel"].shape[-2] + 1 for name, layer in params.items()}
        return {name: jnp.broadcast_to(jnp.eye(size), (2, size, size)) for name, size in sizes.items()}


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    """Which calibration data were asked for, in order."""
    made = []

    def open_splits(experts, domains, cache):
        return "frozen", {domain: domain for some in domains for domain in some}

    def of_experts(frozen, sources, config):
        made.append(Pairs(sources, config))
        return made[-1]

    monkeypatch.setattr(calibration, "open_splits", open_splits)
    monkeypatch.setattr(calibration, "of_experts", of_experts)
    return made


ON = ("--on", "captions=3")


def read(folder):
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    return rows, json.loads((folder / "sweep.json").read_text())


def test_a_grid_its_table_plot_and_recipe(command, family, tmp_path):
    out = tmp_path / "swept"
    ended = command("sweep", family.recipe, "--merge-method", "ties", "--over", "lambda=0.5:2:0.5",
                    "--over", "density=0.3,1", *ON, "--out", out)  # fmt: skip
    assert ended.status == 0 and "8 candidates from 2 merges" in ended.err
    rows, found = read(out)
    assert [(float(row["scale"]), float(row["density"])) for row in rows] == [
        (s, d) for s in (0.5, 1.0, 1.5, 2.0) for d in (0.3, 1.0)]  # fmt: skip
    base, cats, dogs = (store.load_projector(family.folder / name).params for name in ("w0", "cats", "dogs"))
    measure = Pairs([["cats"], ["dogs"]]).loss
    for row, trial in zip(rows, found["trials"]):
        merged = pivotjax.merge(base, {"cats": cats, "dogs": dogs}, "ties", **trial["options"]).params
        loss = float(measure(jax.tree.map(lambda leaf: leaf[None], merged))[0])
        assert float(row["loss"]) == trial["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["best"]["loss"] == min(trial["loss"] for trial in found["trials"])
    assert set(found["references"]) == {"base", "cats", "dogs"}
    with Image.open(out / "sweep.png") as picture:
        assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5
    text = (out / "sweep.html").read_text()
    assert "<script" not in text and text.count("<img") == text.count('src="data:image/png;base64,') == 1
    assert f"{found['best']['loss']:.4f}" in text

    assert command("merge", out / "recipe.yaml").status == 0
    merged = store.load_projector(out / "merged/projector")
    assert merged.info["merge"]["options"] | found["best"]["options"] == merged.info["merge"]["options"]
    loss = float(measure(jax.tree.map(lambda leaf: leaf[None], merged.params))[0])
    assert loss == pytest.approx(found["best"]["loss"], rel=1e-4)


def test_by_default_beside_the_recipes_output(command, family, tmp_path):
    assert command("sweep", family.recipe, "--over=scale=1", *ON).status == 0
    assert (tmp_path / "out-sweep/sweep.csv").exists() and not (tmp_path / "out").exists()


def test_words_and_whole_numbers(command, family, tmp_path):
    over = ("--over", "basis=energy,cross", "--over", "rank=1:3:1,null")
    assert command("sweep", family.recipe, "--parameters.gram", "none", *over, *ON, "--out", tmp_path / "o").status == 0
    _, found = read(tmp_path / "o")
    assert found["over"] == {"basis": ["energy", "cross"], "rank": [1, 2, 3, None]} and len(found["trials"]) == 8
    best = yaml.safe_load((tmp_path / "o/recipe.yaml").read_text())
    assert best["parameters"] == {"gram": "none"} | found["best"]["options"]


def test_ranges_hold_both_ends_and_no_rounding(command, family, tmp_path):
    assert command("sweep", family.recipe, "--over", "scale=0.1:1.5:0.1,2", *ON).status == 0
    values = [float(row["scale"]) for row in read(tmp_path / "out-sweep")[0]]
    assert values == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0]
    again = command("sweep", family.recipe, "--over", "scale=1:0:-0.25", *ON, "--out", tmp_path / "down")
    assert again.status == 0 and len(read(tmp_path / "down")[0]) == 5


def test_what_candidates_are_measured_on(command, family, tmp_path, pairs):
    """The method sees the recipe's calibration alone; --on decides where the loss comes from."""

    def asked(*args):
        pairs.clear()
        over = ("--over", "scale=1", "--out", tmp_path / "-".join(args))
        assert command("sweep", family.recipe, *over, *args).status == 0
        return [(each.sources, each.config.captions) for each in pairs]

    experts = [["cats"], ["dogs"]]
    assert asked("--on", "captions=3") == [(experts, 3)]
    assert asked("--on", "domains=both,dogs", "captions=5") == [([["both", "dogs"]], 5)]
    (tmp_path / "on.yaml").write_text("calibration: {captions: 7, domains: [both]}\n")
    assert asked("--on", str(tmp_path / "on.yaml")) == [([["both"]], 7)]
    family.recipe.write_text(f"{family.recipe.read_text()}merge_method: regmean\ncalibration: {{captions: 9}}\n")
    assert asked() == [(experts, 9), (experts, 9)]
    assert asked("--on", "domains=both") == [(experts, 9), ([["both"]], 24)]
    best = yaml.safe_load((tmp_path / "--on-domains=both/recipe.yaml").read_text())
    assert best["calibration"]["captions"] == 9 and best["merge_method"] == "regmean"


def test_the_choice_follows_the_data(command, family, tmp_path):
    """On the way from one expert to the other: as far as the domain that is measured on wants."""
    for domain, best in (("cats", 0), ("dogs", 1)):
        options = ("--merge-method", "slerp", "--over", "t=0,0.5,1", "--on", f"domains={domain}")
        assert command("sweep", family.recipe, *options, "--out", tmp_path / domain).status == 0
        assert read(tmp_path / domain)[1]["best"]["options"] == {"t": best}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "nothing to vary: give --over OPTION=VALUES"),
        (("--over", "energie=0.5,1"), "'energie' (did you mean 'energy'?)"),
        (("--over", "energy=0.5,2"), "'energy': 2 must be in (0, 1]"),
        (("--over", "energy"), "--over energy: write OPTION=VALUES"),
        (("--over", "energy="), "--over energy=: '' is neither a number nor a word"),
        (("--over", "scale=1:0.5:0.1"), "--over scale=1:0.5:0.1: the range 1:0.5:0.1 is empty"),
        (("--over", "scale=0:1:0"), "a range is START:STOP:STEP"),
        (("--over", "scale=0:1"), "a range is START:STOP:STEP"),
        (("--over", "scale=0:inf:1"), "a range is START:STOP:STEP"),
        (("--over", "scale=1", "--over", "lambda=2"), "--over varies scale twice"),
        (("--over", "scale=1", "--base", "nowhere"), "no checkpoint at nowhere"),
        (("--over", "scale=1", "--on", "caption=3"), "--on: unknown key `caption`; did you mean `captions`?"),
        (("--over", "scale=1", "--on", "captions"), "cannot read the recipe captions"),
        (("--over", "scale=1", "--on", "captions=3", "dogs"), "--on dogs: give one YAML file, or KEY=VALUE"),
        (("--over", "scale=1", "--on", "captions=0"), "captions must be at least 1, not 0"),
        (("--over", "scale=1", "--merge-method", "pivt"), "'pivt' (did you mean 'pivot'?)"),
        (("--over", "scale=1", "--merge-method", "average"), "merge method 'average' has no option 'scale'"),
    ],
)
def test_bad_input(refused, family, tmp_path, args, said):
    on = () if "--on" in args else ON
    assert said in refused("sweep", family.recipe, *args, *on)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["family", "recipe.yaml"]


def test_without_calibration_base_or_output(refused, family, tmp_path):
    assert "no calibration data to measure on: give --on" in refused("sweep", family.recipe, "--over", "scale=1")
    text = family.recipe.read_text()
    family.recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith("base_model")))
    no_base = ("--merge-method", "regmean", "--parameters.on", "weights", "--calibration.captions", 3)
    assert "give base_model, or leave scale out" in refused("sweep", family.recipe, *no_base, "--over", "scale=1")
    family.recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith("out")))
    assert "--out" in refused("sweep", family.recipe, "--over", "scale=1", *ON)


def test_no_finite_loss(command, family, tmp_path, monkeypatch):
    monkeypatch.setattr(Pairs, "loss", lambda self, params: jnp.full(jax.tree.leaves(params)[0].shape[0], jnp.nan))
    ended = command("sweep", family.recipe, "--over", "scale=1,2", *ON)
    assert ended.status == 2 and "none of 2 candidates has a finite calibration loss" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err and not (tmp_path / "out-sweep/sweep.json").exists()


def test_another_sweep_in_the_same_folder(refused, command, family, tmp_path):
    assert command("sweep", family.recipe, "--over", "scale=1", *ON).status == 0
    assert "holds output made with" in refused("sweep", family.recipe, "--over", "scale=1,2", *ON)


def test_help(command):
    ended = command("sweep", "--help")
    assert ended.status == 0
    for word in ("--over", "--on", "--out", "START:STOP:STEP", "domains=emoji,icons", "sweep.csv"):
        assert word in ended.out
