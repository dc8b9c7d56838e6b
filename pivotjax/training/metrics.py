"""What a run says about itself: loss, speed, memory, incidents; as JSON lines always, for TensorBoard on request."""

import contextlib
import errno
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from pivotjax import files
from pivotjax.config import check_least
from pivotjax.data.pipeline import Batch, Share
from pivotjax.errors import InputError
from pivotjax.training import hosts

# Peak bf16 FLOP/s of one device as JAX names its kind (v4, v5p: a chip with two TensorCores). Source: the pages of the
# versions at https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured beside training; rows go to `metrics.jsonl` every `training.log_every` steps."""

    tensorboard: bool = False
    """Also write TensorBoard's files, to `tensorboard` below `out`."""
    profile_from: int = 0
    """First step of a profile by jax.profiler, written to `profile` below `out`; 0: none."""
    profile_steps: int = 3
    """Steps in the profile."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out captions, written to `held_out.jsonl`; 0: none."""
    evaluate_batches: int = 4
    """Batches of an evaluation, the same each time."""
    evaluate_split: Literal["calibration", "test"] = "calibration"
    """Which held-out split of each domain is evaluated."""

    def __post_init__(self) -> None:
        check_least(self, profile_from=0, profile_steps=1, evaluate_every=0, evaluate_batches=1)


class Work(NamedTuple):
    """The arithmetic that training cannot do without, in FLOPs (`pivotjax.tpu.flops.minimum` has the formulas)."""

    token: float = 0.0
    """A token of a sequence: the decoder's matrices and its attention, forward and back."""
    image: float = 0.0
    """An image: the projector and, where images are encoded inside the step, the encoder."""
    target: float = 0.0
    """A caption token that is predicted: the head, forward and back."""


class Counts(NamedTuple):
    """What one process's batches held."""

    tokens: int
    samples: int
    targets: int


def contents(batch: Batch) -> Counts:
    """Of a batch: tokens that are no padding, visual ones included; samples; caption tokens to predict."""
    if "segments" in batch:
        tokens = np.count_nonzero(batch["segments"])
    else:  # up to and with the place that predicts the last caption token
        last = np.where(batch["weights"] > 0, batch["places"] + 1, 0)
        tokens = last.max(axis=-1).sum()
    return Counts(int(tokens), int(np.count_nonzero(batch["ids"] >= 0)), int(np.count_nonzero(batch["weights"])))


class Meter:
    """Speed between two rows of metrics, over all processes.

    Time spent within `aside` does not count at all.
    """

    def __init__(self, work: Work, share: Share | None, peak: float | None, clock: Callable[[], float]):
        self._work, self._clock = work, clock
        self._share = (0, 0) if share is None else (share.experts.start, share.rows.start)
        self._peak = peak  # FLOP/s of all devices
        self.restart()

    def restart(self) -> None:
        """Forgets what was before (a compilation)."""
        self._started, self._waited, self._steps, self._counts = self._clock(), 0.0, 0, Counts(0, 0, 0)

    def waited(self, seconds: float) -> None:
        """Notes time in which the devices had nothing to do because a batch was not there."""
        self._waited += seconds

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training (an evaluation)."""
        started = self._clock()
        yield
        self._started += self._clock() - started

    def count(self, found: Counts) -> None:
        """Notes a step with this process's part of a batch."""
        self._steps += 1
        self._counts = Counts(*(a + b for a, b in zip(self._counts, found)))

    def row(self) -> dict[str, float | None]:
        """Measured since the row before; every process calls it at the same step.

        `seconds_per_step`, `tokens_per_second` (padding left out), `samples_per_second`, `mfu` (share of the devices'
        peak; None where that is unknown), `input_wait` (share of the time, of the process that waits most) and
        `memory_bytes` (of the fullest device, else of the largest process).
        """
        seconds = max(self._clock() - self._started, 1e-9)
        told = hosts.gather(
            {
                "counts": np.array([*self._share, *self._counts], np.int32),
                "wait": np.float32(self._waited / seconds),
                "memory": np.float32(memory_bytes()),
            }
        )
        tokens, samples, targets = once_each_share(told["counts"])
        steps = max(self._steps, 1)
        work = self._work
        flops = (tokens * work.token + samples * work.image + targets * work.target) / seconds
        self.restart()
        return {
            "seconds_per_step": round(seconds / steps, 4),
            "tokens_per_second": round(tokens / seconds, 2),
            "samples_per_second": round(samples / seconds, 3),
            "mfu": round(flops / self._peak, 4) if self._peak and flops else None,
            "input_wait": round(float(told["wait"].max()), 4),
            "memory_bytes": int(told["memory"].max()),
        }


def once_each_share(told: np.ndarray) -> np.ndarray:
    """[processes, 2 + n]: where each process's share starts, and n counts -> counts summed over the distinct shares.

    Processes along the `tensor` axis are fed the same rows, which are not to be counted twice.
    """
    _, first = np.unique(told[:, :2], axis=0, return_index=True)
    return told[first, 2:].sum(axis=0)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s of the devices together; None where their kind is not in the table."""
    one = PEAK_FLOPS.get(devices[0].device_kind)
    return one and one * len(devices)


def memory_bytes() -> int:
    """The most that one of this process's devices has held; where devices do not tell, the process itself."""
    told = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in told if one and "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Log:
    """The files that a run writes as it goes, below `folder`; only process 0 writes. Use as a context manager.

    Rows of steps after `done` are dropped first: those steps are about to be run again.
    """

    def __init__(self, folder: Path, done: int, tensorboard: bool):
        self._writes = jax.process_index() == 0
        self._files: dict[str, Any] = {}
        self._board = None
        if self._writes:
            for name in ("metrics", "held_out", "incidents"):
                drop_rows_after(folder / f"{name}.jsonl", done)
            self._folder = folder
            self._board = _board(folder / "tensorboard", done) if tensorboard else None

    def metrics(self, row: dict[str, Any]) -> None:
        """A row of `metrics.jsonl`."""
        self._write("metrics", row)
        self._scalars(row["step"], row)

    def held_out(self, row: dict[str, Any]) -> None:
        """A row of `held_out.jsonl`."""
        self._write("held_out", row)
        self._scalars(row["step"], {"held_out": row})

    def incident(self, row: dict[str, Any]) -> None:
        """A row of `incidents.jsonl`."""
        self._write("incidents", row)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if not self._writes:
            return
        path, line = self._folder / f"{name}.jsonl", (json.dumps(row) + "\n").encode()
        try:
            if name not in self._files:
                self._files[name] = open(path, "ab", buffering=0)
            if self._files[name].write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; free some space or change --out") from error

    def _scalars(self, step: int, row: dict[str, Any], prefix: str = "") -> None:
        for key, value in row.items() if self._board is not None else ():
            if isinstance(value, dict):
                self._scalars(step, value, f"{prefix}{key}/")
            elif value is not None and key != "step":
                self._board.add_scalar(f"{prefix}{key}", float(value), step)


def _board(folder: Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError("metrics.tensorboard needs tensorboardX; pip install 'pivotjax[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=done + 1)


def drop_rows_after(path: Path, done: int) -> None:
    """Keeps the rows of a JSONL file up to step `done`; a last row that a kill cut short goes too."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    if rows:
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= done]
        files.write_bytes(path, "".join(kept).encode())


def read_metrics(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl` (or `held_out`, `incidents`); none where there is no such file."""
    path = folder / f"{name}.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


class Profile:
    """A window of `jax.profiler`, on process 0: `begin` before a step is started, `end` when it is finished."""

    def __init__(self, config: MetricsConfig, folder: Path):
        self._steps = range(config.profile_from, config.profile_from + config.profile_steps)
        self._wanted = config.profile_from > 0 and jax.process_index() == 0
        self._folder, self._running = folder, False

    def begin(self, step: int) -> None:
        """Starts the profile where `step` is its first."""
        if self._wanted and step == self._steps.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its hooks into all Python threads crash some processes that have many
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def end(self, step: int) -> None:
        """Writes the profile where `step` is its last."""
        if self._running and step == self._steps.stop - 1:
            self.close()

    def close(self) -> None:
        """Writes what there is, where the run ends within the window."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def per_expert(names: Sequence[str], **columns: np.ndarray) -> dict[str, dict[str, Any]]:
    """name -> its value of each column, as JSON: None for what is not finite."""
    rows = {}
    for k, name in enumerate(names):
        values = {key: column[k].item() for key, column in columns.items()}
        rows[name] = {key: v if isinstance(v, bool) or np.isfinite(v) else None for key, v in values.items()}
    return rows
