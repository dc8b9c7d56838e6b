"""`pivotjax pretrain` on real weights: interrupted, resumed bit for bit, refused where its checkpoint is broken."""

import os
import signal

import jax
import numpy as np
import pytest
import yaml
from processes import run

from pivotjax.checkpoints import store, torch_bridge
from pivotjax.models import projector
from pivotjax.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.assets]
SMALL = (
    "pretrain train/mini.yaml --data.domains shapes --data.train 24 --data.calibration 4 --data.test 4 "
    "--training.steps 5 --training.batch 1 --training.log-every 1 --checkpoints.every-steps 1"
).split()


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """An uninterrupted run, and one that Ctrl-C stopped after its first checkpoint and that was started again."""
    assets("smollm2-135m", "efficientnet-lite0", "easy-vqa")
    folder = tmp_path_factory.mktemp("pretrain")
    whole = run(*SMALL, "--out", folder / "whole", log=folder / "whole.log")
    first = folder / "cut" / "training" / "1"
    stopped = run(*SMALL, "--out", folder / "cut", log=folder / "stopped.log", until=first, stop=signal.SIGINT)
    resumed = run(*SMALL, "--out", folder / "cut", log=folder / "resumed.log")
    return folder, whole, stopped, resumed


def test_interrupted_and_started_again_it_gives_the_same_bits(runs):
    folder, whole, stopped, resumed = runs
    assert (whole.status, stopped.status, resumed.status) == (0, 130, 0), runs
    assert "interrupted; the same command goes on from what is finished" in stopped.err
    assert "going on from step" in resumed.err and "going on" not in whole.err
    assert not any("Traceback" in one.err or "Warning" in one.err for one in runs[1:])
    for name in ("w0", "shapes"):
        a, b = (store.load_projector(folder / out / "projectors" / name) for out in ("whole", "cut"))
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    whole_rows, cut_rows = (read_metrics(folder / out) for out in ("whole", "cut"))
    assert [row["shapes"] for row in whole_rows] == [row["shapes"] for row in cut_rows]
    assert [row["step"] for row in cut_rows] == [1, 2, 3, 4, 5]


def test_what_it_leaves(runs):
    folder = runs[0] / "whole"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints.json",
        "config.yaml",
        "metrics.jsonl",
        "projectors",
        "training",
    ]
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["steps"] == 5
    w0, shapes = (store.load_projector(folder / "projectors" / name) for name in ("w0", "shapes"))
    assert shapes.info["init_id"] == w0.info["fingerprint"] == projector.fingerprint(w0.params)
    assert shapes.info["name"] == "expert:shapes" and shapes.info["domains"] == ["shapes"] and shapes.info["alive"]
    assert shapes.info["samples"] == {"shapes": {"train": 24, "calibration": 4, "test": 4}}
    assert shapes.info["fingerprint"] != w0.info["fingerprint"]
    from_torch, info = torch_bridge.load_torch(folder / "projectors" / "shapes.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_torch, shapes.params)
    assert info["backbone"] == shapes.info["backbone"] and len(info["backbone"]["language"]) == 64


def test_a_truncated_training_checkpoint_is_said_and_the_one_before_it_serves(runs):
    folder = runs[0]
    for path in (folder / "cut" / "training" / "5").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    ended = run(*SMALL, "--out", folder / "cut", log=folder / "broken.log")
    assert ended.status == 0 and "Traceback" not in ended.err, ended.err
    assert f"training checkpoint {folder}/cut/training/5 is damaged; put aside as 5.damaged" in ended.err
    assert "going on from step 4" in ended.err
    a, b = (store.load_projector(folder / out / "projectors" / "shapes") for out in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_another_recipe_in_the_same_folder(runs):
    ended = run(*SMALL, "--seed", 1, "--out", runs[0] / "whole", log=runs[0] / "other.log")
    assert ended.status == 2 and ended.err.count("\n") == 1
    assert "holds output made with seed = 0, now it is 1" in ended.err
