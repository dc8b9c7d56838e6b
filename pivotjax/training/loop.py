"""The training loop: steps, metrics, checkpoints, resume."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pivotjax import files
from pivotjax.checkpoints import store
from pivotjax.config import check_least
from pivotjax.errors import InputError
from pivotjax.progress import Bar, say
from pivotjax.training import parallel
from pivotjax.training.optimizer import TrainingConfig, schedule
from pivotjax.training.step import Metrics, TrainState


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved (projector, optimizer state and data iterator only)."""

    every_steps: int = 25
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        check_least(self, every_steps=1, keep=1)


def train(
    step: Any,
    state: TrainState,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    names: Sequence[str],
    config: TrainingConfig,
    checkpoints: CheckpointConfig,
    folder: Path,
) -> TrainState:
    """Runs `step` until `config.steps`, resuming from the newest checkpoint below `folder` if there is one.

    `batches` is a grain iterator; its state is part of each checkpoint, so a resumed run sees the very batches that an
    uninterrupted one would. Metrics go to `folder/metrics.jsonl`. Raises InputError when no expert is left alive.
    """
    state = jax.device_put(state, parallel.shardings(mesh, "state", state))
    frozen = jax.device_put(frozen, parallel.shardings(mesh, "frozen", frozen))
    jitted = jax.jit(step, donate_argnums=0)
    rate = schedule(config)
    with store.training_checkpoints(folder / "training", keep=checkpoints.keep) as saved:
        state, batches = saved.restore(state, batches)
        done = int(state.step)
        metrics_file = _resumed_metrics(folder / "metrics.jsonl", done)
        if done:
            say(f"going on from step {done}")
        was_alive = np.asarray(state.alive)
        with Bar(config.steps, "pre-training", "step", initial=done) as bar, open(metrics_file, "a") as log:
            started = time.monotonic()
            for number in range(done + 1, config.steps + 1):
                state, metrics = jitted(state, frozen, parallel.put_batch(mesh, next(batches)))
                alive = np.asarray(metrics.alive)
                _watch(was_alive, alive, names, number)
                was_alive = alive
                if number % config.log_every == 0 or number in (1, config.steps):
                    seconds = (time.monotonic() - started) / (number - done)
                    _log(log, number, names, metrics, float(rate(number - 1)), seconds)
                bar.update(1, f"loss {np.nanmean(np.asarray(metrics.loss)):.2f}")
                if number % checkpoints.every_steps == 0 or number == config.steps:
                    log.flush()
                    saved.save(number, state, batches)
    return state


def _watch(before: np.ndarray, now: np.ndarray, names: Sequence[str], step: int) -> None:
    for name, was, lives in zip(names, before, now, strict=True):
        if was and not lives:
            say(
                f"expert {name}: loss or gradient not finite at step {step}; "
                "it keeps its last finite weights, the others go on"
            )
    if not now.any():
        raise InputError(
            f"no expert has a finite loss at step {step} ({', '.join(names)}); "
            "lower training.learning_rate or check the data"
        )


def _log(log: Any, step: int, names: Sequence[str], metrics: Metrics, rate: float, seconds: float) -> None:
    if jax.process_index() == 0:
        row = {"step": step, "learning_rate": rate, "seconds_per_step": round(seconds, 4)}
        for name, loss, norm, alive in zip(names, *map(np.asarray, metrics), strict=True):
            finite = bool(np.isfinite(loss))
            row[name] = {
                "loss": float(loss) if finite else None,
                "gradient_norm": float(norm) if np.isfinite(norm) else None,
                "alive": bool(alive),
            }
        log.write(json.dumps(row) + "\n")
        log.flush()


def _resumed_metrics(path: Path, done: int) -> Path:
    """Drops the rows after step `done`: the steps they tell of are about to be run again."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    files.write_bytes(
        path, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= done).encode()
    )
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl`."""
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
