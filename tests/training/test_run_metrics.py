"""Numbers about a run, on a clock that is known and batches whose contents are counted by hand."""

import json

import numpy as np
import pytest

from pivotjax.errors import InputError
from pivotjax.training import metrics
from pivotjax.training.metrics import Counts, Log, Meter, Work, contents, drop_rows_after, once_each_share, read_metrics


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_speed_mfu_and_input_wait():
    """4 steps of 2 s, half a second of each waiting for input; an evaluation of 100 s beside them."""
    clock = Clock()
    meter = Meter(Work(token=4 * 7e9, image=5e12, target=1e9), None, peak=4 * 197e12, clock=clock)
    clock.now += 50  # loading
    with meter.aside():
        clock.now += 1000
    meter.row()
    for _ in range(4):
        clock.now += 2
        meter.waited(0.5)
        meter.count(Counts(tokens=3000, samples=8, targets=100))
    with meter.aside():
        clock.now += 100
    row = meter.row()
    assert row["seconds_per_step"] == 2 and row["tokens_per_second"] == 1500 and row["samples_per_second"] == 4
    assert row["mfu"] == pytest.approx((1500 * 4 * 7e9 + 4 * 5e12 + 50 * 1e9) / (4 * 197e12), abs=1e-4)
    assert row["input_wait"] == 0.25
    clock.now += 3
    assert meter.row()["tokens_per_second"] == 0  # counted anew


def test_mfu_needs_a_peak_and_the_work():
    clock = Clock()
    for work, peak in ((Work(1e9), None), (Work(), 1e12)):
        meter = Meter(work, None, peak, clock)
        meter.count(Counts(10, 1, 4))
        clock.now += 1
        assert meter.row()["mfu"] is None


def test_the_peak_is_that_of_all_devices():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert metrics.peak_flops([Device("TPU v5 lite")] * 256) == 256 * 197e12
    assert metrics.peak_flops([Device("cpu")]) is None


def test_tokens_of_a_batch_without_its_padding():
    """2 experts, 1 row: 3 visual tokens, one of a prompt, captions of 2 and 4 of at most 4 tokens (L = 3 + 1 + 3)."""
    weights = np.array([[[1, 1, 0, 0]], [[1, 1, 1, 1]]], np.float32)
    batch = {"weights": weights, "places": np.broadcast_to(3 + np.arange(4), weights.shape)}
    batch["ids"] = np.array([[[7]], [[-1]]])
    assert contents(batch) == Counts(tokens=(4 + 1) + (4 + 3), samples=1, targets=6)
    packed = {"segments": np.array([[[1, 1, 1, 2, 2, 0, 0]]]), "ids": np.array([[[0, 5]]])}
    assert contents(packed | {"weights": np.array([[[1, 1, 1, 0]]])}) == Counts(5, 2, 3)


def test_rows_fed_to_two_processes_count_once():
    """Experts 0 and 2 begin shares; the third process holds the same share as the second, of another `tensor` part."""
    told = np.array([[0, 0, 100, 8], [2, 0, 90, 8], [2, 0, 90, 8], [2, 4, 10, 1]])
    assert once_each_share(told).tolist() == [200, 17]


def test_a_log_goes_on_after_the_last_whole_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    with Log(tmp_path, done=2, tensorboard=False) as log:
        log.metrics({"step": 3, "again": True})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert read_metrics(tmp_path, "incidents") == []
    drop_rows_after(path, 0)
    assert path.read_text() == ""


def test_a_full_disk_is_one_line(tmp_path, small_disk):
    with small_disk(40), Log(tmp_path, 0, tensorboard=False) as log, pytest.raises(InputError, match="cannot write"):
        for step in range(10):
            log.metrics({"step": step})


def test_tensorboard_has_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with Log(tmp_path, 0, tensorboard=True) as log:
        log.metrics({"step": 3, "mfu": None, "cats": {"loss": 2.5, "alive": True}})
        log.held_out({"step": 3, "mean": 1.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    written = path.read_bytes()
    assert b"cats/loss" in written and b"held_out/mean" in written and b"mfu" not in written
