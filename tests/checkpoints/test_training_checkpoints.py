"""Checkpoints of training state: the newest whole one is found, cut-off and damaged ones are passed over."""

import errno
import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import atomicity

from pivotjax import files
from pivotjax.checkpoints import training
from pivotjax.checkpoints.store import disk_errors
from pivotjax.checkpoints.training import CheckpointConfig, checksums, training_checkpoints
from pivotjax.errors import InputError


class State(NamedTuple):
    step: jax.Array
    params: dict
    alive: jax.Array


@pytest.fixture
def folder(tmp_path):
    """Where the checkpoints of a run in `tmp_path` lie."""
    return tmp_path / "training"


def state(step):
    random = np.random.default_rng(step).normal(size=(3, 200)).astype(np.float32)
    return State(jnp.int32(step), {"w": jnp.array(random)}, jnp.array([True, False]))


def write(folder, steps, losses=None, **config):
    with training_checkpoints(folder.parent, CheckpointConfig(**config)) as saved:
        for step in steps:
            saved.save(step, state(step), {"corrupt image": step}, losses and losses.get(step))


def read(folder, /, **config):
    with training_checkpoints(folder.parent, CheckpointConfig(**config)) as saved:
        return saved.restore(state(0))


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_newest_is_restored_with_its_counts(folder):
    write(folder, [1, 2, 3])
    found, counts = read(folder)
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    assert counts == {"corrupt image": 3} and steps_in(folder) == [2, 3]


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("runs/training"), [1])
    found, _ = read(Path("runs/training"))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


def test_nothing_there_gives_back_what_came(folder):
    found, counts = read(folder)
    jax.tree.map(np.testing.assert_array_equal, found, state(0))
    assert counts == {}


def test_what_is_saved_is_the_state_at_that_moment_though_its_memory_is_used_again(folder):
    """As the loop does: the next step is given the state's buffers while the save is under way."""
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1 if a.dtype != bool else a, s), donate_argnums=0)
    with training_checkpoints(folder.parent, CheckpointConfig(keep=9)) as saved:
        now, expected = state(1), {}
        for number in range(1, 9):
            expected[number] = jax.tree.map(np.array, now)
            saved.save(number, now, {})
            for _ in range(3):
                now = step(now)
    with training_checkpoints(folder.parent, CheckpointConfig(keep=9)) as saved:
        for number in range(8, 0, -1):
            found, _ = saved.restore(state(0))
            jax.tree.map(np.testing.assert_array_equal, found, expected[number])
            (folder / str(number)).rename(folder / f"seen-{number}")
            saved._checkpointer.reload()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_one_is_said_and_the_one_before_serves(folder, capsys, harm):
    write(folder, [1, 2, 3], keep=3)
    for step in ("2", "3"):
        harm(largest_file(folder / step))
    found, counts = read(folder, keep=3)
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
    said = capsys.readouterr().err
    assert counts == {"corrupt image": 1} and said.count("\n") == 2
    for step in (2, 3):
        assert f"{folder}/{step} is damaged; put aside as {step}.damaged, trying the one before" in said
    write(folder, [2, 3], keep=2)  # what was damaged can be saved again, and does not count among those kept
    assert steps_in(folder) == [2, 3]
    jax.tree.map(np.testing.assert_array_equal, read(folder)[0], state(3))


def test_a_save_that_was_cut_off_is_cleaned_away(folder):
    write(folder, [1])
    (folder / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    jax.tree.map(np.testing.assert_array_equal, read(folder)[0], state(1))
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_the_best_are_kept_beside_the_newest(folder):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 5: 6.0}
    write(folder, range(1, 7), losses, keep=2, keep_best=2)
    assert steps_in(folder) == [2, 3, 5, 6]


def test_the_loop_goes_on_while_a_save_is_under_way(folder, monkeypatch):
    """The disk stands still until the caller has gone on."""
    gone_on, rename = threading.Event(), os.rename

    def slow(*args, **options):
        assert gone_on.wait(20)
        rename(*args, **options)

    monkeypatch.setattr(os, "rename", slow)
    with training_checkpoints(folder.parent, CheckpointConfig()) as saved:
        saved.save(1, state(1), {})
        saved.check()
        assert steps_in(folder) == []  # not there yet, and we are here
        gone_on.set()
        saved.wait()
        assert steps_in(folder) == [1]


def test_a_full_disk_is_noticed_and_costs_nothing_that_was_saved(folder, small_disk):
    write(folder, [1], keep=1)
    with pytest.raises(InputError, match=f"cannot write {folder}: no space left"):
        with small_disk(2000):
            write(folder, [2], keep=1)
    jax.tree.map(np.testing.assert_array_equal, read(folder, keep=1)[0], state(1))


def test_an_error_of_the_disk_is_no_damage(folder, monkeypatch):
    write(folder, [1, 2])

    def fails(*args):
        raise RuntimeError("cannot load") from OSError(errno.EIO, "Input/output error (NFS server not responding)")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.training.Checkpointer, "load_checkpointables", fails)
        with pytest.raises(InputError, match=f"cannot read the training checkpoint {folder}/2: .*Input/output error"):
            read(folder)
    assert steps_in(folder) == [1, 2]
    jax.tree.map(np.testing.assert_array_equal, read(folder)[0], state(2))


def test_a_disk_that_fails_within_tensorstore_is_no_damage(folder, monkeypatch):
    """Whose error has words alone: it is asked for the files once more."""
    write(folder, [1])
    flip_a_bit(folder / "1" / "state" / "manifest.ocdbt")

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256", fails)
    with pytest.raises(InputError, match=f"cannot read the training checkpoint {folder}/1: .*Input/output error"):
        read(folder)


def test_a_state_of_other_arrays_is_refused_with_the_versions(folder, monkeypatch):
    monkeypatch.setattr(training, "versions", lambda: {"pivotjax": "1", "optax": "0.1"})
    write(folder, [1, 2])
    monkeypatch.setattr(training, "versions", lambda: {"pivotjax": "1", "optax": "0.2"})
    other = state(0)._replace(params={"w": jnp.zeros((3, 200)), "more": jnp.zeros(2)})
    said = r"holds another state \(params/more: None, here float32\[2\]\), made with optax 0.1, here 0.2"
    with training_checkpoints(folder.parent, CheckpointConfig()) as saved, pytest.raises(InputError, match=said):
        saved.restore(other)
    assert steps_in(folder) == [1, 2]


def test_metadata_that_orbax_cannot_list_are_one_line(folder):
    write(folder, [1, 2])
    path = folder / "2" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("init_timestamp_nsecs", "init_timestamp_nsdcs"))
    with pytest.raises(InputError, match=f"the training checkpoints in {folder} cannot be listed"):
        read(folder)


def test_where_all_are_damaged_nothing_begins_anew(folder):
    write(folder, [1, 2])
    for step in ("1", "2"):
        flip_a_bit(largest_file(folder / step))
    for _ in range(2):
        with pytest.raises(InputError, match=f"no whole training checkpoint is in {folder}, though"):
            read(folder)
    (folder.parent / "checkpoints.json").unlink()  # killed before it was written
    with pytest.raises(InputError, match="no whole training checkpoint"):
        read(folder)


def test_checkpoints_that_are_out_of_reach(folder):
    """A shared disk that is not mounted, a folder that is mistyped."""
    write(folder, [1])
    assert files.read_json(folder.parent / "checkpoints.json") == {"folder": str(folder), "step": 1}
    with pytest.raises(InputError, match=r"no whole training checkpoint is in .*/other, though"):
        read(folder, folder=str(folder.parent / "other"))
    folder.rename(folder.parent / "other")
    jax.tree.map(np.testing.assert_array_equal, read(folder, folder=str(folder.parent / "other"))[0], state(1))


def test_a_bucket_without_its_client_is_one_line(tmp_path, no_gcsfs):
    with pytest.raises(InputError, match=r'gs://bucket/run needs gcsfs: pip install "pivotjax\[gcs\]"'):
        read(tmp_path, folder="gs://bucket/run")


def test_a_bucket_without_the_client_of_orbax_is_one_line(tmp_path, bucket, monkeypatch):
    """Which lists the steps by google-cloud-storage; gcsfs brings it along."""
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(InputError, match=r'gs://bucket/run needs gcsfs: pip install "pivotjax\[gcs\]"'):
        read(tmp_path, folder="gs://bucket/run")


@pytest.mark.parametrize(
    "text, said",
    [
        ("Checkpoint directory does not exist: /run/training/2.orbax-checkpoint-tmp/state", "it went away meanwhile"),
        ("[Errno 2] No such file or directory: '/run/training/2/state'", "it went away meanwhile"),
        ("[Errno 20] Not a directory: '/run/training'", "it may not be written to"),
        ("[Errno 30] Read-only file system: '/run/training'", "it may not be written to"),
        ("ResourceExhausted: error writing local file: No space left on device", "no space left"),
    ],
)
def test_what_orbax_raises_when_a_disk_goes_away_in_mid_save(text, said):
    """Seen one by one: which of them comes depends on the moment."""
    with pytest.raises(InputError, match=f"^cannot write /run/training: {said}"), disk_errors("/run/training"):
        raise ValueError(text)
    with pytest.raises(ValueError, match="something else"), disk_errors("/run/training"):
        raise ValueError("something else")


def test_a_folder_that_is_taken_away_in_mid_save(folder, monkeypatch):
    """Moved when Orbax has made the place of the arrays and writes them."""
    write(folder, [1])
    real = atomicity.AtomicRenameTemporaryPath.finalize

    async def late(self, *args, **options):
        if folder.exists():
            folder.rename(folder.parent / "away")
        return await real(self, *args, **options)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", late)
    with pytest.raises(InputError, match=f"cannot write {folder}: it went away meanwhile"):
        write(folder, [2])
    monkeypatch.undo()
    (folder.parent / "away").rename(folder)
    jax.tree.map(np.testing.assert_array_equal, read(folder)[0], state(1))


def test_checksums_see_values_places_and_nothing_else():
    with jax.enable_x64(True):
        tree = {kind: jnp.arange(12, dtype=kind).reshape(3, 4) for kind in ("float32", "bfloat16", "int8", "float64")}
    tree["alive"] = jnp.array([True, False])
    sums = checksums(tree)
    assert sums.shape == (5,) and len(set(sums.tolist())) == 5
    np.testing.assert_array_equal(sums, checksums(jax.tree.map(jnp.copy, tree)))
    swapped = {name: leaf.at[..., 0].set(leaf[..., 1]).at[..., 1].set(leaf[..., 0]) for name, leaf in tree.items()}
    assert (checksums(swapped) != sums).all()
    nearly = tree["float32"].at[1, 2].set(np.nextafter(np.float32(6), np.float32(7)))
    assert (checksums(tree | {"float32": nearly}) != sums).sum() == 1
