"""Checkpoints of training state: the newest is found, an unfinished one is cleaned away, a broken one is named."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivotjax.checkpoints import store
from pivotjax.errors import InputError


class State(NamedTuple):
    step: jax.Array
    params: dict


def state(step):
    return State(jnp.int32(step), {"w": jnp.full((3, 2), step, jnp.float32)})


def batches():
    data = grain.MapDataset.range(100).seed(1).shuffle()
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def write(folder, steps, keep=2):
    stream, seen = batches(), []
    with store.training_checkpoints(folder, keep) as saved:
        for step in steps:
            seen.append(int(next(stream)))
            saved.save(step, state(step), stream)
    return seen, int(next(stream))


def read(folder, keep=2):
    with store.training_checkpoints(folder, keep) as saved:
        return saved.restore(state(0), batches())


def test_the_newest_is_restored_with_its_place_in_the_data(tmp_path):
    _, following = write(tmp_path, [1, 2, 3])
    found, stream = read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    assert int(next(stream)) == following
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("runs/training"), [1])
    found, _ = read(Path("runs/training"))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


def test_nothing_there_gives_back_what_came(tmp_path):
    found, stream = read(tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, found, state(0))
    assert int(next(stream)) == int(next(batches()))


def test_a_broken_one_is_named_and_the_one_before_serves(tmp_path):
    write(tmp_path, [1, 2])
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=f"{tmp_path}/2 cannot be read; remove it"):
        read(tmp_path)
    shutil.rmtree(tmp_path / "2")
    found, _ = read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
