"""`pivotjax pretrain` in a rough world: 5 % of corrupt pictures, a truncated tar, a shard that cannot be read, a worker
process that is killed. The run goes on, says what it met, and learns what an undisturbed run learns, bitwise."""

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_world
from PIL import Image
from processes import COMMAND, environment
from tiny_world import COLOURS

from pivotjax.checkpoints import store
from pivotjax.training.metrics import read_metrics

SHARDS, SAMPLES = 3, 80


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def picture(number, seed):
    """A JPEG of one colour with its caption; of every twentieth, the first half alone."""
    colour, data = COLOURS[(number * 7 + seed) % len(COLOURS)], io.BytesIO()
    Image.new("RGB", (40 + number % 9, 30), colour).save(data, "JPEG")
    whole = data.getvalue()
    return (whole if number % 20 else whole[: len(whole) // 2]), f"a {colour} picture"


def corpus(folder, seed):
    """Shards as img2dataset writes them; the last of them is cut in the middle, and beside them lies one that is a
    folder."""
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(SAMPLES * shard, SAMPLES * (shard + 1)):
                data, caption = picture(number, seed)
                add(archive, f"{number:09}.jpg", data)
                add(archive, f"{number:09}.txt", caption.encode())
                add(archive, f"{number:09}.json", json.dumps({"key": f"{number:09}"}).encode())
    last = folder / f"{SHARDS - 1:05}.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 2 // 3])
    (folder / f"{SHARDS:05}.tar").mkdir()
    return {"format": "webdataset", "path": str(folder / "*.tar")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rough")
    return tiny_world.recipe(
        folder,
        {name: corpus(folder / name, seed) for seed, name in enumerate(("left", "right"))},
        {"train": None, "calibration": 4, "test": 4, "bad_limit": 0.1},
        training={"steps": 60, "batch": 4, "learning_rate": 0.002, "log_every": 1},
        checkpoints={"every_steps": 20},
    )


def pretrain(recipe, out, *args):
    command = [*COMMAND, "pretrain", str(recipe), "--out", str(out), *args]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def workers(pid):
    """Child processes that make batches."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_rough_world_costs_no_more_than_the_samples_that_are_lost(recipe, tmp_path):
    calm = pretrain(recipe, tmp_path / "calm")
    said = calm.communicate(timeout=300)[1]
    assert calm.returncode == 0, said
    assert "00003.tar" in said and "00002.tar" in said and "met while reading samples" in said, said
    rows = read_metrics(tmp_path / "calm")
    assert rows[-1]["bad"]["corrupt image"] > 5
    assert all(row[name]["alive"] for row in rows for name in ("left", "right"))
    assert rows[-1]["left"]["loss"] < rows[0]["left"]["loss"]

    rough = pretrain(recipe, tmp_path / "rough", "--data.workers", "1")
    deadline, metrics = time.monotonic() + 200, tmp_path / "rough" / "metrics.jsonl"
    while (not metrics.exists() or not metrics.read_text()) and time.monotonic() < deadline and rough.poll() is None:
        time.sleep(0.02)
    killed = workers(rough.pid)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    said = rough.communicate(timeout=300)[1]
    assert rough.returncode == 0 and killed, said
    for name in ("left", "right"):
        one, other = (store.load_projector(tmp_path / run / "projectors" / name).params for run in ("calm", "rough"))
        for layer in one:
            for leaf in one[layer]:
                np.testing.assert_array_equal(one[layer][leaf], other[layer][leaf])
    assert read_metrics(tmp_path / "rough")[-1]["bad"] == rows[-1]["bad"]
