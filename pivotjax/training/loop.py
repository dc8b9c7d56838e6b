"""The training loop: steps, metrics, checkpoints, resume, and how a run ends."""

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int64

from pivotjax.checkpoints.training import CheckpointConfig, TrainingCheckpoints, training_checkpoints
from pivotjax.data.decode import listed
from pivotjax.data.domains import check_names
from pivotjax.data.pipeline import COUNTED, HOST_KEYS, Batch, Feed
from pivotjax.errors import InputError
from pivotjax.progress import Bar, say
from pivotjax.training import hosts
from pivotjax.training.evaluation import HeldOut, mean_loss
from pivotjax.training.incidents import Watch
from pivotjax.training.metrics import (
    Counts,
    Log,
    Meter,
    MetricsConfig,
    Profile,
    Work,
    contents,
    once_each_share,
    peak_flops,
    per_expert,
)
from pivotjax.training.optimizer import TrainingConfig, schedule
from pivotjax.training.parallel import Layout
from pivotjax.training.step import Metrics, TrainState

TERMINATED = 143  # exit status after SIGTERM, as a shell gives it


def train(
    step: Callable,
    state: TrainState,
    frozen: Any,
    feed: Feed,
    *,
    layout: Layout,
    config: TrainingConfig,
    checkpoints: CheckpointConfig,
    metrics: MetricsConfig,
    folder: Path,
    held_out: HeldOut | None = None,
    work: Work | None = None,
    belongs: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Runs `step` until `config.steps`, going on from the newest whole checkpoint if there is one.

    Every process of the run calls it with the same arguments, but for its share of `feed`. Batches are addressed by
    step, so a resumed run sees the very batches that an uninterrupted one would.

    Args:
        step: of `pivotjax.training.step.make_step`, not compiled.
        state, frozen: put onto the devices of `layout` here.
        held_out: evaluated every `metrics.evaluate_every` steps.
        work: least arithmetic of a token and an image, for the MFU; None: no MFU.
        belongs: what the run is made of (JSON); a checkpoint made of something else is refused.
        clock: seconds, never set back.

    Returns the state after the last step, on its devices. Files below `folder`: `metrics.jsonl`, `incidents.jsonl`,
    `held_out.jsonl`, `checkpoints.json` (where and up to which step checkpoints were saved), `training/`.

    Raises InputError when no expert is left alive, where `config.guard` says abort, where a step does not fit the
    devices' memory, where checkpoints that were saved are not there, and on a disk that cannot be written to. On
    SIGTERM, the step is finished and saved, and SystemExit(143) raised, in all processes together.
    """
    check_names(feed.names)
    with (
        training_checkpoints(folder, checkpoints, belongs) as saved,
        _sigterm() as told_to_end,
        _lack_of_memory(),
    ):
        state, counts = saved.restore(layout.put_state(state))
        done = int(hosts.fetch(state.step))
        if done:
            say(f"going on from step {done}")
        with Log(folder, done, metrics.tensorboard) as log, Bar(config.steps, "pre-training", "step", done) as bar:
            peak = peak_flops(list(layout.mesh.devices.flat))
            run = _Run(
                step=layout.compile(step),
                frozen=layout.put_frozen(frozen),
                feed=feed,
                layout=layout,
                config=config,
                checkpoints=checkpoints,
                evaluate_every=metrics.evaluate_every if held_out else 0,
                held_out=held_out,
                saved=saved,
                log=log,
                bar=bar,
                meter=Meter(work or Work(), feed.share, peak, clock),
                profile=Profile(metrics, folder / "profile"),
                watch=Watch(feed, layout, config.guard, log),
                told_to_end=told_to_end,
                clock=clock,
                rates=jax.device_get(jax.vmap(schedule(config))(jnp.arange(config.steps))),
                done=done,
                alive=hosts.fetch(state.alive),
                bad_before=Counter(counts),
            )
            return run.go(state)


class _Started(NamedTuple):
    """A step that the devices may still be at work on."""

    number: int
    metrics: Metrics
    ids: Int64[np.ndarray, "K B I"]
    counts: Counts
    ended: Future[float]  # when the devices were done with it


@dataclass
class _Run:
    """A run's parts, and where it is. Metrics are fetched a step late, so that the devices always have work."""

    step: Callable
    frozen: Any
    feed: Feed
    layout: Layout
    config: TrainingConfig
    checkpoints: CheckpointConfig
    evaluate_every: int
    held_out: HeldOut | None
    saved: TrainingCheckpoints
    log: Log
    bar: Bar
    meter: Meter
    profile: Profile
    watch: Watch
    told_to_end: threading.Event
    clock: Callable[[], float]
    rates: Float[np.ndarray, " steps"]
    done: int  # steps of the lives before this one
    alive: Bool[np.ndarray, " K"]
    bad_before: Counter[str]  # of the lives before this one
    bad: Int64[np.ndarray, " C"] = field(default_factory=lambda: np.zeros(len(COUNTED), np.int64))  # of this process
    started: _Started | None = None
    time_to_save: bool = False

    def __post_init__(self) -> None:
        self.last_saved = self.clock()
        self.watcher = ThreadPoolExecutor(1, "watch")

    def go(self, state: TrainState) -> TrainState:
        """Steps `done + 1` to the last."""
        if self.done >= self.config.steps:
            return state
        with (
            contextlib.closing(self.feed.start(self.done)) as batches,
            contextlib.closing(self.profile),
            contextlib.ExitStack() as leaving,
        ):
            leaving.callback(self.watcher.shutdown, wait=False)  # a step may never end, where another process is gone
            for number in range(self.done + 1, self.config.steps + 1):
                state = self._start(number, state, batches)
                self.saved.check()
                last, end = number == self.config.steps, self.told_to_end.is_set() or hosts.preempted(number)
                if self.evaluate_every and (last or number % self.evaluate_every == 0):
                    loss = self._evaluate(number, state)
                else:
                    loss = None
                best = loss is not None and self.checkpoints.keep_best > 0
                if last or end or best or self.time_to_save or number % self.checkpoints.every_steps == 0:
                    self._save(number, state, loss, sure=last or end)
                if end and not last:
                    self._end(number)
        self._summary()
        return state

    def _start(self, number: int, state: TrainState, batches: Iterator[Batch]) -> TrainState:
        """Starts step `number`, then looks at how the one before it went."""
        asked = self.clock()
        batch = next(batches)
        self._note_wait(asked)
        on_devices = {key: a for key, a in batch.items() if key not in HOST_KEYS}
        self.bad += batch["bad"]
        self.profile.begin(number)
        state, metrics = self.step(state, self.frozen, self.layout.put_batch(on_devices))
        self._finish()
        ended = self.watcher.submit(_ended, metrics, self.clock)
        self.started = _Started(number, metrics, batch["ids"], contents(batch), ended)
        return state

    def _note_wait(self, asked: float) -> None:
        """A batch asked for at `asked` has come: the devices waited since they were done with the step before."""
        ended = self.started.ended if self.started else None
        if ended is None or ended.done():
            self.meter.waited(self.clock() - max(asked, ended.result() if ended else asked))

    def _finish(self) -> None:
        """Waits for the step under way: its incidents, its row of metrics."""
        if self.started is None:
            return
        (number, metrics, ids, counts, _), self.started = self.started, None
        metrics = hosts.fetch(metrics)
        self.profile.end(number)
        self.meter.count(counts)
        self.watch.look(number, metrics, self.alive, ids)
        self.alive = metrics.alive
        if number % self.config.log_every == 0 or number in (1, self.config.steps):
            self._row(number, metrics)
        elif number == self.done + 1:  # what compiles is no measure of what comes after
            self.meter.restart()
        finite = metrics.loss[np.isfinite(metrics.loss)]
        self.bar.update(1, f"loss {finite.mean():.2f}" if finite.size else "")

    def _row(self, number: int, metrics: Metrics) -> None:
        row = {"step": number, "learning_rate": float(self.rates[number - 1])} | self.meter.row()
        columns = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "alive": metrics.alive}
        self.log.metrics(row | {"bad": dict(self._bad())} | per_expert(self.feed.names, **columns))
        if self.checkpoints.every_minutes:  # here, where the processes can agree on it
            due = self.clock() - self.last_saved >= 60 * self.checkpoints.every_minutes
            self.time_to_save = bool(hosts.gather(np.asarray(due))[0])

    def _bad(self) -> Counter[str]:
        """What was met while reading samples since the run's very beginning, by reason."""
        share = self.feed.share
        place = (share.experts.start, share.rows.start) if share else (0, 0)
        told = once_each_share(hosts.gather(np.array([*place, *self.bad], np.int32)))
        return self.bad_before + Counter(dict(zip(COUNTED, told.tolist())))

    def _evaluate(self, number: int, state: TrainState) -> float:
        """Held-out loss of every expert after step `number`; their mean."""
        self._finish()
        with self.meter.aside():
            losses = self.held_out(state.params, self.frozen)
        mean = mean_loss(losses)
        row = {"step": number, "mean": mean if np.isfinite(mean) else None}
        self.log.held_out(row | per_expert(self.feed.names, loss=losses))
        return mean

    def _save(self, number: int, state: TrainState, loss: float | None, sure: bool) -> None:
        self._finish()
        self.saved.save(number, state, dict(self._bad()), loss, sure)
        self.last_saved, self.time_to_save = self.clock(), False

    def _end(self, number: int) -> None:
        say(f"told to end (SIGTERM): step {number} is finished and saved; the same command goes on from there")
        raise SystemExit(TERMINATED)

    def _summary(self) -> None:
        if bad := self._bad():
            say("met while reading samples: " + listed(bad.items()))


def _ended(metrics: Metrics, clock: Callable[[], float]) -> float:
    """When the devices were done with a step; a step that failed tells so where its metrics are fetched."""
    with contextlib.suppress(Exception):
        jax.block_until_ready(metrics)
    return clock()


@contextlib.contextmanager
def _lack_of_memory() -> Iterator[None]:
    """A step that does not fit the devices is the recipe's to mend."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"a step does not fit the devices' memory ({str(error).splitlines()[0][:200]}); lower "
            "training.device_batch, set training.remat (layers) or spread more over mesh.fsdp; `pivotjax compile` "
            "tells what fits"
        ) from error


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of what it did before.

    With several processes JAX listens for the signal, and tells all of them (`hosts.preempted`).
    """
    told = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
