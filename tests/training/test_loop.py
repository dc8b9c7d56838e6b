"""The loop: resuming is bitwise, disks fill up cleanly, what goes wrong is said, written down and survived."""

import dataclasses
import itertools
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_feed import TinyFeed

from pivotjax.checkpoints.training import CheckpointConfig
from pivotjax.data.pipeline import COUNTED
from pivotjax.errors import InputError
from pivotjax.training.evaluation import HeldOut
from pivotjax.training.loop import train
from pivotjax.training.metrics import MetricsConfig, Work, read_metrics
from pivotjax.training.optimizer import GuardConfig
from pivotjax.training.parallel import MeshConfig, layout, make_mesh
from pivotjax.training.step import make_evaluation

STEPS = 7


def go(tiny, folder, *, stop_after=None, every=1, change=None, experts=2, guard=None, **options):
    """Trains; stops (as a kill would, between two steps) after `stop_after` batches."""
    given = itertools.count(1)

    def changed(step, batch):
        if stop_after is not None and next(given) > stop_after:
            raise KeyboardInterrupt
        if change is not None:
            change(step, batch)

    training = dataclasses.replace(tiny.training, steps=STEPS, log_every=1, guard=guard or GuardConfig())
    tiny = tiny._replace(training=training)
    own = layout("jit", make_mesh(MeshConfig(), experts, 4))
    options.setdefault("checkpoints", CheckpointConfig(every_steps=every))
    options.setdefault("metrics", MetricsConfig())
    state = train(
        tiny.step(own),
        tiny.state(experts),
        tiny.frozen,
        TinyFeed(tiny, experts, change=changed),
        layout=own,
        config=training,
        folder=folder,
        held_out=HeldOut(make_evaluation(tiny.network, training, own), TinyFeed(tiny, experts, seed=99), own, 2),
        **options,
    )
    return jax.tree.map(np.asarray, state)


def nan_in(expert, at=None):
    def change(step, batch):
        if at is None or step + 1 == at:
            batch["features"][expert] = np.nan

    return change


@pytest.mark.parametrize(("stop", "every"), [(1, 1), (2, 1), (4, 3), (6, 2), (2, 5)])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tiny, tmp_path, stop, every):
    whole = go(tiny, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path / "cut", stop_after=stop, every=every)
    resumed = go(tiny, tmp_path / "cut", every=every)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    rows, expected = read_metrics(tmp_path / "cut"), read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["e0"] for row in rows] == [row["e0"] for row in expected]


def test_finished_run_trains_no_more(tiny, tmp_path):
    first = go(tiny, tmp_path)
    again = go(tiny, tmp_path, stop_after=0)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(tiny, tmp_path, capsys):
    whole = go(tiny, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path / "cut", stop_after=5)
    for path in (tmp_path / "cut" / "training" / "5").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    capsys.readouterr()
    resumed = go(tiny, tmp_path / "cut")
    said = capsys.readouterr().err
    assert "training/5 is damaged; put aside as 5.damaged" in said and "going on from step 4" in said
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, stop_after=3, belongs={"backbone": "vicuna"})
    with pytest.raises(InputError, match=r"training/3 was made with another backbone \('vicuna', now 'qwen'\)"):
        go(tiny, tmp_path, belongs={"backbone": "qwen"})


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(tiny, tmp_path, capsys):
    def terminate(step, batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, before = go(tiny, tmp_path / "whole"), signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        go(tiny, tmp_path / "cut", every=100, change=terminate)
    said = capsys.readouterr().err
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert said.count("\n") == 1 and "step 4 is finished and saved; the same command goes on from there" in said
    resumed = go(tiny, tmp_path / "cut", every=100)
    assert "going on from step 4" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_dead_expert_is_reported_and_all_dead_is_an_error(tiny, tmp_path, capsys):
    state = go(tiny, tmp_path / "one", change=nan_in(1))
    assert state.alive.tolist() == [True, False]
    assert "expert e1: loss or gradient not finite at step 1" in capsys.readouterr().err
    assert read_metrics(tmp_path / "one")[-1]["e1"] == {"loss": None, "gradient_norm": None, "alive": False}
    with pytest.raises(InputError, match=r"no expert has a finite loss at step 1 \(e0\)"):
        go(tiny, tmp_path / "all", change=nan_in(0), experts=1)


@pytest.mark.parametrize("policy", ["retire", "skip"])
def test_a_nan_is_written_down_with_its_samples(tiny, tmp_path, policy):
    """And afterwards the expert is as the policy says: frozen, or trained on without that step."""
    clean = go(tiny, tmp_path / "clean")
    state = go(tiny, tmp_path / "nan", change=nan_in(1, at=4), guard=GuardConfig(not_finite=policy))
    (found,) = read_metrics(tmp_path / "nan", "incidents")
    assert found == {
        "step": 4,
        "expert": "e1",
        "kind": "not finite",
        "action": policy,
        "loss": None,
        "gradient_norm": None,
        "keys": [f"e1-{3 * 8 + 4 + row}" for row in range(4)],  # step 4 is batch 3, of 2 x 4 samples
    }
    assert state.alive.tolist() == [True, policy == "skip"]
    losses = [row["e1"]["loss"] for row in read_metrics(tmp_path / "nan")]
    assert losses[3] is None and np.isfinite(losses[4])
    for mine, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(clean.params)):
        np.testing.assert_array_equal(mine[0], theirs[0])  # the other expert never noticed


def test_a_nan_ends_the_run_where_the_policy_is_abort(tiny, tmp_path):
    with pytest.raises(InputError, match=r"step 4 went wrong for e1 and training\.guard says abort"):
        go(tiny, tmp_path, change=nan_in(1, at=4), guard=GuardConfig(not_finite="abort"))
    assert read_metrics(tmp_path, "incidents")[0]["action"] == "abort"
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["2", "3"]
    resumed = go(tiny, tmp_path)  # with the sample mended, from the last good step
    assert int(resumed.step) == STEPS and read_metrics(tmp_path, "incidents") == []


def leap(step, batch):
    if step == 4:  # 50 times one token's loss less 49 times another's
        batch["weights"][0] = [50, -49, 0, 0, 0]


@pytest.mark.parametrize(("policy", "incidents"), [("ignore", 0), ("skip", 1)])
def test_a_leap_of_the_loss(tiny, tmp_path, policy, incidents):
    guard = GuardConfig(spike=policy, spike_factor=2, spike_warmup=2)
    state = go(tiny, tmp_path, change=leap, guard=guard)
    found = read_metrics(tmp_path, "incidents")
    assert len(found) == incidents and state.alive.all()
    assert all((row["step"], row["expert"], row["kind"]) == (5, "e0", "spike") for row in found)
    moments = jax.tree.leaves(state.opt_state)
    counts = next(leaf for leaf in moments if leaf.dtype == np.int32)
    assert counts.tolist() == [STEPS - incidents, STEPS]  # updates that were made


def test_held_out_loss_chooses_what_is_kept(tiny, tmp_path):
    checkpoints = CheckpointConfig(every_steps=100, keep=1, keep_best=1)
    go(tiny, tmp_path, checkpoints=checkpoints, metrics=MetricsConfig(evaluate_every=2))
    rows = read_metrics(tmp_path, "held_out")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    for row in rows:
        assert row["mean"] == pytest.approx((row["e0"]["loss"] + row["e1"]["loss"]) / 2)
    best = min(rows, key=lambda row: row["mean"])["step"]
    assert {int(path.name) for path in (tmp_path / "training").iterdir()} == {best, STEPS}


def test_held_out_loss_is_that_of_the_step_before_its_update(tiny, tmp_path):
    """The loss of a step on a batch is the held-out loss of the state before it on that batch."""
    own = layout("jit", make_mesh(MeshConfig(), 2, 4))
    state = own.put_state(tiny.state(2))
    batch = own.put_batch({k: v for k, v in next(TinyFeed(tiny).start(0)).items() if k not in ("ids", "bad")})
    one = HeldOut(make_evaluation(tiny.network, tiny.training, own), TinyFeed(tiny), own, 1)
    losses = one(state.params, tiny.frozen)
    _, metrics = jax.jit(tiny.step(own))(state, tiny.frozen, batch)
    np.testing.assert_allclose(losses, metrics.loss, rtol=1e-6)


def test_bad_samples_are_counted_over_all_lives(tiny, tmp_path, capsys):
    def bad(step, batch):
        batch["bad"][0] += 1 if step < 5 else 0
        batch["bad"][2] += step == 6

    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, stop_after=4, every=2, change=bad)
    go(tiny, tmp_path, every=2, change=bad)
    assert read_metrics(tmp_path)[-1]["bad"] == {COUNTED[0]: 5, COUNTED[2]: 1}
    assert f"met while reading samples: 5 {COUNTED[0]}, 1 {COUNTED[2]}" in capsys.readouterr().err


def test_checkpoints_by_time(tiny, tmp_path):
    """Every look at the loop's clock is 20 seconds later."""
    ticks = itertools.count(0.0, 20.0)
    checkpoints = CheckpointConfig(every_steps=100, every_minutes=2, keep=100)
    go(tiny, tmp_path, checkpoints=checkpoints, clock=lambda: next(ticks))
    saved = sorted(int(path.name) for path in (tmp_path / "training").iterdir())
    assert STEPS in saved and 2 <= len(saved) < STEPS


@pytest.mark.parametrize("jump", [4e9, -3e5])
def test_a_clock_that_jumps_while_saving_costs_no_more_than_that_checkpoint(tiny, tmp_path, monkeypatch, capsys, jump):
    real, since = time.time, time.monotonic() + 1e9

    def jumps(step, batch):
        nonlocal since
        if step == 3:  # the save after step 3 is under way
            since = time.monotonic()

    whole = go(tiny, tmp_path / "whole")
    monkeypatch.setattr(time, "time", lambda: real() + jump * (time.monotonic() >= since))
    state = go(tiny, tmp_path / "jumped", change=jumps)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    jax.tree.map(np.testing.assert_array_equal, whole, go(tiny, tmp_path / "jumped", stop_after=0))  # all is saved


def test_a_save_that_timed_out_and_still_writes_is_left_to_the_next_start(tiny, tmp_path, monkeypatch):
    real, since, ended = time.time, time.monotonic() + 1e9, threading.Event()
    left = tmp_path / "jumped" / "training" / "9.orbax-checkpoint-tmp"

    def write():
        for number in itertools.count():
            (left / str(number)).mkdir(parents=True, exist_ok=True)
            if ended.wait(1e-4):
                return

    writer = threading.Thread(target=write)

    def jumps(step, batch):
        nonlocal since
        if step == 3:
            since = time.monotonic()
            writer.start()

    whole = go(tiny, tmp_path / "whole")
    monkeypatch.setattr(time, "time", lambda: real() + 4e9 * (time.monotonic() >= since))
    try:
        state = go(tiny, tmp_path / "jumped", change=jumps)
    finally:
        ended.set()
        writer.join()
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    assert left.exists()
    jax.tree.map(np.testing.assert_array_equal, whole, go(tiny, tmp_path / "jumped", stop_after=0))
    deadline = time.monotonic() + 60  # Orbax cleans in a thread that nobody waits for
    while left.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left.exists()


@pytest.mark.parametrize("size", [300, 3000])
def test_full_disk_is_one_line_and_costs_nothing_that_was_saved(tiny, tmp_path, small_disk, size):
    whole = go(tiny, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path / "full", every=2, stop_after=4)
    with small_disk(size), pytest.raises(InputError, match="cannot write"):
        go(tiny, tmp_path / "full", every=2)
    resumed = go(tiny, tmp_path / "full", every=2)  # and once there is space, the run goes on
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_folder_that_cannot_be_written_to(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot write to {tmp_path}/file/training"):
        go(tiny, tmp_path / "file")


def test_a_checkpoint_folder_that_turns_read_only(tiny, tmp_path):
    """Here by becoming a regular file, which binds root too."""

    def swap(step, batch):
        if step == 4:
            while not (tmp_path / "training/2").exists():  # what a save does whose folder goes away: the tests of saves
                time.sleep(0.01)
            (tmp_path / "training").rename(tmp_path / "away")
            (tmp_path / "training").write_text("")

    whole = go(tiny, tmp_path / "whole")
    with pytest.raises(InputError, match="cannot write"):
        go(tiny, tmp_path, every=2, change=swap)
    (tmp_path / "training").unlink()
    shutil.move(tmp_path / "away", tmp_path / "training")
    jax.tree.map(np.testing.assert_array_equal, whole, go(tiny, tmp_path, every=2))


def test_a_step_that_does_not_fit_the_memory_is_one_line(tiny, tmp_path):
    with pytest.raises(InputError, match=r"does not fit the devices' memory \(RESOURCE_EXHAUSTED: .*device_batch"):
        go(tiny, tmp_path, change=lambda step, batch: jnp.zeros(2**50, jnp.int8))


def test_checkpoints_that_are_not_there_stop_a_run_before_it_drops_its_rows(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, stop_after=4)
    before = read_metrics(tmp_path)
    with pytest.raises(InputError, match=f"no whole training checkpoint is in {tmp_path}/mistyped, though this run"):
        go(tiny, tmp_path, checkpoints=CheckpointConfig(folder=str(tmp_path / "mistyped")))
    assert before and read_metrics(tmp_path) == before


def test_speed_on_a_clock_that_is_known(tiny, tmp_path):
    """Each look at the clock is a second later, so a step takes as many seconds as it has looks."""
    looks = []

    def clock():
        looks.append(len(looks))
        return float(len(looks))

    go(tiny, tmp_path, clock=clock, work=Work(token=1e3))
    rows = read_metrics(tmp_path)
    batch = tiny.batch(3, 2)
    tokens = sum(4 + 1 - 1 + int(row.sum()) for row in batch["weights"].reshape(8, -1))  # visual, prompt, caption
    row = rows[3]
    assert row["samples_per_second"] == pytest.approx(8 / row["seconds_per_step"], rel=1e-3)
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds_per_step"], rel=1e-3)
    assert 0 <= row["input_wait"] < 1 and row["memory_bytes"] > 1e7 and row["mfu"] is None  # no peak of a CPU is known


def test_input_wait_is_the_time_in_which_devices_have_nothing_to_do(tiny, tmp_path):
    go(tiny, tmp_path, every=100, change=lambda step, batch: time.sleep(0.3))
    assert np.median([row["input_wait"] for row in read_metrics(tmp_path)]) > 0.5


def test_tensorboard_and_profile_on_request(tiny, tmp_path):
    pytest.importorskip("tensorboardX")
    go(tiny, tmp_path, metrics=MetricsConfig(tensorboard=True, profile_from=2, profile_steps=2))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
