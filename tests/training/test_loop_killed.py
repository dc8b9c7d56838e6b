"""Twenty times SIGKILL, while starting and in the middle of saving too: the run goes on from what is whole and ends
with the same bits."""

import multiprocessing
import random
import time

import loopback
import numpy as np
import pytest

from pivotjax.training.metrics import read_metrics

STEPS, KILLS = 160, 20
EARLY = range(2, KILLS, 4)  # kills while starting, restoring, cleaning up
PATIENCE = 60  # seconds for a life to show a sign of itself


@pytest.fixture(scope="module")
def processes():
    """Makes processes quickly: forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loopback"])
    return lambda out, every: context.Process(target=loopback.life, args=(out, STEPS, every))


def wait_for(sign, one):
    until = time.monotonic() + PATIENCE
    while one.is_alive() and not sign():
        assert time.monotonic() < until
        time.sleep(0.0005)


def newest(folder):
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(processes, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    whole = processes(tmp_path / "whole", STEPS)
    whole.start()
    whole.join()
    assert whole.exitcode == 0

    out, dice, while_saving, start_up = tmp_path / "killed", random.Random(0), 0, 0.0
    saved = out / "training"
    for kill in range(KILLS):
        before, started = newest(saved), time.monotonic()
        one = processes(out, 1)
        one.start()
        if kill in EARLY:
            time.sleep(dice.uniform(0, start_up))
        else:  # a checkpoint more than before: this life is at work; then at any moment, or while one is being written
            wait_for(lambda before=before: newest(saved) > before, one)
            start_up = time.monotonic() - started
            time.sleep(dice.uniform(0, 0.3))
        if kill % 2:
            wait_for(lambda: any(saved.glob("*.orbax-checkpoint-tmp")), one)
        one.kill()
        one.join()
        assert one.exitcode == -9, "finished before it was killed"
        while_saving += any(saved.glob("*.orbax-checkpoint-tmp"))
    assert while_saving >= KILLS // 4

    last = processes(out, STEPS)
    last.start()
    last.join()
    assert last.exitcode == 0
    said = capfd.readouterr().err
    assert KILLS - len(EARLY) <= said.count("going on from step") <= KILLS
    assert "Traceback" not in said and "damaged" not in said
    with np.load(tmp_path / "whole" / "final.npz") as expected, np.load(out / "final.npz") as found:
        assert set(expected) == set(found) and len(found.files) == 4
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])
    rows, undisturbed = read_metrics(out), read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["e1"] for row in rows] == [row["e1"] for row in undisturbed]
    assert not any(saved.glob("*tmp*"))
