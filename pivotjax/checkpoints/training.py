"""Checkpoints of a training run: asynchronous, atomic, the newest and the best kept, what is damaged passed over.

A run whose checkpoints are out of reach ends with a line, and does not begin anew over its results: it notes in its
output folder that it has saved some.
"""

import contextlib
import errno
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from pivotjax import files
from pivotjax.checkpoints import store
from pivotjax.config import check_least
from pivotjax.errors import InputError
from pivotjax.progress import say
from pivotjax.versions import versions

_policies = ocp.training.preservation_policies
_PAUSES = (0.0, 1.0, 5.0)  # seconds before each try of a save that must not be missing
_SAVED = "checkpoints.json"  # in a run's output folder: where and up to which step it has saved checkpoints
_NO_DAMAGE = (OSError, MemoryError, jax.errors.JaxRuntimeError)  # causes, other than a file that is missing
_ODD = np.uint32(2654435761)  # Knuth's multiplicative hash: 2^32 over the golden ratio


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved (projector and optimizer state only; the data follow from the step)."""

    folder: str = ""
    """Where they lie (default: `training` below `out`); with several hosts a place that all see (gs://..., NFS)."""
    every_steps: int = 25
    """Steps between checkpoints."""
    every_minutes: float = 0.0
    """Also save when so many minutes have passed since the last checkpoint; 0: by steps alone."""
    keep: int = 2
    """How many of the newest are kept."""
    keep_best: int = 0
    """Keep so many more: those with the lowest held-out loss. Every evaluation's state is then saved."""

    def __post_init__(self) -> None:
        check_least(self, every_steps=1, every_minutes=0, keep=1, keep_best=0)


class TrainingCheckpoints:
    """Opened by `training_checkpoints`; every process calls every method, at the same steps."""

    def __init__(self, out: Path, config: CheckpointConfig, belongs: dict[str, Any]):
        self._out, self._config, self._belongs = out, config, belongs
        self._folder = prepare_folder(out, config)
        self._checkpointer = self._open(clean=True)
        self._saving: tuple[int, Any] | None = None

    def save(
        self, step: int, state: Any, counts: dict[str, int], loss: float | None = None, sure: bool = False
    ) -> None:
        """Starts to save `state` (a NamedTuple of arrays) as it is now, and returns before it is on the disk.

        `counts` are the bad samples so far, by reason; `loss` is the held-out loss that `keep_best` goes by. With
        `sure` it waits until the checkpoint is there. Raises InputError if this save, or the one before, failed.
        """
        self.wait()
        note = {"sums": checksums(state).tolist(), "counts": counts, "belongs": self._belongs}
        note |= {"structure": _structure(state), "versions": versions()}
        metrics = None if loss is None else {"loss": loss}
        for pause in _PAUSES:
            time.sleep(pause)
            with self._lateness(step):
                saving = self._checkpointer.save_checkpointables_async(
                    step, {"state": state._asdict()}, force=True, metrics=metrics, custom_metadata=note
                )
                self._saving = (step, saving)
                if not sure or self.wait():
                    return
        tries = len(_PAUSES)
        raise InputError(f"cannot write {self._folder / str(step)}: saving timed out {tries} times; check the disk")

    def check(self) -> None:
        """Notices the end of a save that is under way, without waiting for it; InputError if it failed."""
        if self._saving is not None and not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> bool:
        """Until the save that is under way is on the disk; InputError if it failed.

        False if it timed out. Orbax times it by the clock of the day, and when somebody sets that, nothing is wrong.
        """
        if self._saving is None:
            return True
        (step, saving), self._saving = self._saving, None
        with self._lateness(step):
            saving.result()
            if jax.process_index() == 0:
                if _on_disk(self._folder):
                    store.note_sizes(Path(self._folder / str(step)))
                files.write_json(self._out / _SAVED, {"folder": str(self._folder), "step": step})
            return True
        return False

    @contextlib.contextmanager
    def _lateness(self, step: int) -> Iterator[None]:
        """A save that times out is given up, and what it may still write is left for the next start to clean away."""
        try:
            with store.disk_errors(self._folder):
                yield
        except (TimeoutError, OSError) as error:
            if not _of_a_late_save(error):
                raise
            if jax.process_count() > 1:  # the other processes wait for this one's part of the checkpoint
                raise InputError(f"saving step {step} timed out; start again from the checkpoint before it") from error
            say(f"saving step {step} timed out (was the clock set?); the checkpoint before it stays, going on")
            self.close()
            self._checkpointer = self._open(clean=False)

    def close(self) -> None:
        """Waits for what is under way."""
        try:
            self.wait()
        finally:
            try:
                with store.disk_errors(self._folder):
                    self._checkpointer.close()
            except (TimeoutError, OSError) as error:  # Orbax tells of it once more
                if not _of_a_late_save(error):
                    raise

    def _open(self, clean: bool) -> ocp.training.Checkpointer:
        """With `clean` what an earlier run half saved is removed, which nobody may still be writing to."""
        try:
            with store.disk_errors(self._folder), files.plain_errors(str(self._folder)):
                return ocp.training.Checkpointer(
                    Path(self._folder).absolute() if _on_disk(self._folder) else self._folder,
                    preservation_policy=_preservation(self._config),
                    cleanup_tmp_directories=clean,
                )
        except InputError:
            raise
        except OSError as error:
            raise _cannot_read(self._folder, error) from error
        except ValueError as error:  # from one checkpoint's metadata; which one's, Orbax does not say
            raise InputError(
                f"the training checkpoints in {self._folder} cannot be listed ({error}); remove the one whose "
                "_CHECKPOINT_METADATA is damaged, to go on from another"
            ) from error

    def restore(self, state: Any) -> tuple[Any, dict[str, int]]:
        """The newest whole checkpoint: (state in the shardings of `state`, counts); (`state`, {}) where there is none.

        One that is damaged is said, renamed to `<step>.damaged` and passed over for the one before it. InputError if a
        checkpoint cannot be read for another reason than its content, if it belongs to another run or holds a state of
        other arrays, and where no whole one is left of those that this run has saved.
        """
        while (latest := self._checkpointer.latest) is not None:
            folder = self._folder / str(latest.step)
            if self._complete(folder):
                found = self._load(latest, state)
                if found is not None:
                    return found
            self._put_aside(folder)
        _check_none_was_saved(self._out, self._folder)
        return state, {}

    def _complete(self, folder: epath.Path) -> bool:
        try:
            return _agreed(not _on_disk(folder) or store.complete(Path(folder)))
        except OSError as error:
            raise _cannot_read(folder, error) from error

    def _load(self, latest: Any, state: Any) -> tuple[Any, dict[str, int]] | None:
        """A checkpoint's content, None if it is not what was saved."""
        folder = self._folder / str(latest.step)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state._asdict())
        try:
            note = self._checkpointer.checkpointables_metadata(latest).custom_metadata
            if not note:  # what Orbax makes of JSON that is broken
                raise ValueError("it says nothing about itself")
            self._check_belongs(note.get("belongs", {}), folder)
            _check_structure(note, state, folder)
            loaded = self._checkpointer.load_checkpointables(latest, {"state": abstract})
        except InputError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            _check_damaged(folder, error)
            return None
        found = type(state)(**loaded["state"])
        return (found, note["counts"]) if checksums(found).tolist() == note["sums"] else None

    def _check_belongs(self, saved: dict[str, Any], folder: epath.Path) -> None:
        differing = sorted(key for key in saved if saved[key] != self._belongs.get(key))
        if differing:
            raise InputError(
                f"the training checkpoint {folder} was made with another {differing[0]} "
                f"({saved[differing[0]]!r}, now {self._belongs.get(differing[0])!r}); give another --out"
            )

    def _put_aside(self, folder: epath.Path) -> None:
        if jax.process_index() == 0:
            aside = folder.with_name(f"{folder.name}.damaged")
            say(f"the training checkpoint {folder} is damaged; put aside as {aside.name}, trying the one before")
            aside.rmtree(missing_ok=True)
            folder.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {folder.name}")
        self._checkpointer.reload()


@contextlib.contextmanager
def training_checkpoints(
    out: Path, config: CheckpointConfig, belongs: dict[str, Any] | None = None
) -> Iterator[TrainingCheckpoints]:
    """Opens (and makes) the folder of the training checkpoints of the run in `out`; a save that was cut off is cleaned
    away.

    `belongs` (JSON) says what the run is made of; a checkpoint that names another is refused. On leaving, a save that
    is under way is waited for. InputError on a full or read-only disk, and as `prepare_folder` says.
    """
    saved = TrainingCheckpoints(out, config, json.loads(json.dumps(belongs or {})))
    try:
        yield saved
    finally:
        saved.close()


def prepare_folder(out: Path, config: CheckpointConfig) -> epath.Path:
    """Makes the folder of a run's training checkpoints; every process calls it at the same point.

    InputError where it cannot be written to, where not all processes see it, where a bucket's client is not installed,
    and where it is empty though the run in `out` has saved checkpoints.
    """
    folder = epath.Path(config.folder or out / "training")
    try:
        with files.plain_errors(str(folder)):
            _make(folder)
            steps = folder.exists() and any(path.name.isdigit() for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot use {folder}: {error}; mend that or give another checkpoints.folder") from error
    if not _agreed(steps):
        _check_none_was_saved(out, folder)
    return folder


def _check_none_was_saved(out: Path, folder: epath.Path) -> None:
    """For where no whole checkpoint is; InputError unless none has ever been."""
    if _agreed((out / _SAVED).exists() or any(folder.glob("*.damaged"))):
        raise InputError(
            f"no whole training checkpoint is in {folder}, though this run has saved some; give the right "
            "checkpoints.folder, see that its disk is mounted, or begin anew with another --out and checkpoints.folder"
        )


def _check_damaged(folder: epath.Path, error: Exception) -> None:
    """For an error in reading a checkpoint; InputError unless it is the content of its files."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for one in chain:
        if isinstance(one, _NO_DAMAGE) and not isinstance(one, FileNotFoundError):
            raise _cannot_read(folder, one) from error
    if jax.process_count() > 1 or not _on_disk(folder):  # others may have read theirs, and wait; a bucket may be away
        raise _cannot_read(folder, chain[-1], "; if it stays so, remove it to go on from the one before") from error
    try:  # of a disk that fails TensorStore tells in words alone
        for path in Path(folder).rglob("*"):
            if path.is_file():
                files.sha256(path)
    except OSError as failed:
        raise _cannot_read(folder, failed) from error


def _cannot_read(folder: epath.Path, error: BaseException, otherwise: str = "") -> InputError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:300]
    return InputError(
        f"cannot read the training checkpoint {folder}: {reason}; when that is mended the same command goes on from it"
        f"{otherwise}"
    )


def _structure(state: Any) -> dict[str, str]:
    """Name of each array -> dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(state._asdict())
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{a.dtype}{list(a.shape)}" for path, a in leaves}


def _check_structure(note: dict[str, Any], state: Any, folder: epath.Path) -> None:
    """InputError where a checkpoint holds other arrays than the state of this program."""
    saved, now = note.get("structure", {}), _structure(state)
    differing = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if differing:
        before, here = note.get("versions", {"pivotjax": "of before"}), versions()
        made_with = ", ".join(f"{name} {v}, here {here.get(name)}" for name, v in before.items() if v != here.get(name))
        raise InputError(
            f"the training checkpoint {folder} holds another state ({differing[0]}: {saved.get(differing[0])}, here "
            f"{now.get(differing[0])}), made with {made_with or 'the same versions'}; install what it was made with, "
            "or give another --out"
        )


def _of_a_late_save(error: Exception) -> bool:
    """Whether a save timed out, or is still being written to while it is removed."""
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.ENOTEMPTY


def _preservation(config: CheckpointConfig) -> Any:
    newest = _policies.LatestN(config.keep)
    if not config.keep_best:
        return newest
    best = _policies.BestN(
        get_metric_fn=lambda metrics: metrics["loss"],
        reverse=True,
        n=config.keep_best,
        keep_checkpoints_without_metrics=False,
    )
    return _policies.AnyPreservationPolicy([newest, best])


def _on_disk(folder: epath.Path) -> bool:
    """Whether files there can be cut short; objects in a bucket are whole or absent."""
    return "://" not in str(folder)


def _make(folder: epath.Path) -> None:
    """Process 0 makes the folder; InputError where another process does not see it."""
    if jax.process_index() == 0 and _on_disk(folder):
        files.output_folder(Path(folder))
    if jax.process_count() > 1 and not seen_by_all(folder):
        raise InputError(
            f"checkpoints.folder {folder} is not one folder that all processes see; give a bucket (gs://...) or a "
            "network file system that the hosts share"
        )


def seen_by_all(folder: epath.PathLike) -> bool:
    """Whether a folder is the same one in all processes, each of which asks at the same point."""
    token = int(multihost_utils.broadcast_one_to_all(np.asarray(secrets.randbits(31), np.int32)))
    sign = epath.Path(folder) / f".seen-by-all-{token}"
    if jax.process_index() == 0:
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.write_text("")
    multihost_utils.sync_global_devices(f"{token} is there")
    seen = multihost_utils.process_allgather(np.asarray(sign.exists()))
    if jax.process_index() == 0:
        sign.unlink()
    return bool(np.all(seen))


def checksums(tree: Any) -> UInt32[np.ndarray, " leaves"]:
    """A sum a leaf over its elements' bits, each weighted by its place, modulo 2^32: the same on any mesh."""
    return np.asarray(_checksums(tree))


@jax.jit
def _checksums(tree: Any) -> UInt32[Array, " leaves"]:
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(a: Array) -> UInt32[Array, ""]:
    bits = a.astype(jnp.uint8) if a.dtype == bool else a
    words = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * min(bits.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # not a reshape, which would gather a sharded array
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (place * _ODD | 1), dtype=jnp.uint32)


def _agreed(value: bool) -> bool:
    """Process 0's answer, in all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))
