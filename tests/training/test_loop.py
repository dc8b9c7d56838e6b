"""The loop: resuming is bitwise, disks fill up cleanly, dead experts end a run only when all are dead."""

import resource

import grain
import jax
import numpy as np
import pytest

from pivotjax.errors import InputError
from pivotjax.training.loop import CheckpointConfig, read_metrics, train
from pivotjax.training.parallel import MeshConfig, make_mesh

STEPS = 7


def go(tiny, folder, *, stop_after=None, every=1, spoil=(), experts=2):
    """Trains; stops (as a kill would, between two steps) after `stop_after` batches."""
    given = 0

    def make(seed):
        nonlocal given
        given += 1
        if stop_after is not None and given > stop_after:
            raise KeyboardInterrupt
        batch = tiny.batch(int(seed), experts=experts)
        for expert in spoil:
            batch["features"][expert] = np.nan
        return batch

    data = grain.MapDataset.range(1000).seed(3).shuffle().map(make)
    batches = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    state = train(
        tiny.step(),
        tiny.state(experts),
        tiny.frozen,
        batches,
        mesh=make_mesh(MeshConfig(), experts, 4),
        names=[f"e{k}" for k in range(experts)],
        config=tiny.training.__class__(steps=STEPS, learning_rate=1e-2, log_every=1),
        checkpoints=CheckpointConfig(every_steps=every),
        folder=folder,
    )
    return jax.tree.map(np.asarray, state)


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


def test_dead_expert_is_reported_and_all_dead_is_an_error(tiny, tmp_path, capsys):
    state = go(tiny, tmp_path / "one", spoil=[1])
    assert state.alive.tolist() == [True, False]
    assert "expert e1: loss or gradient not finite at step 1" in capsys.readouterr().err
    assert read_metrics(tmp_path / "one")[-1]["e1"] == {"loss": None, "gradient_norm": None, "alive": False}
    with pytest.raises(InputError, match=r"no expert has a finite loss at step 1 \(e0, e1\)"):
        go(tiny, tmp_path / "all", spoil=[0, 1])


def test_full_disk_is_one_line(tiny, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            go(tiny, tmp_path / "full", every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    go(tiny, tmp_path / "full", every=2)  # and once there is space, the run goes on
