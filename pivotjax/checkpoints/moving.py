"""Tensors from one checkpoint to another, a few at a time: read, changed and written by threads within a budget."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from pivotjax.checkpoints.tensors import Checkpoint
from pivotjax.progress import Bar

_THREADS = 3  # one reads, one changes, one writes, whichever comes to it
_BUDGET = 512_000_000  # bytes of tensors under way; one of any size is always allowed


class Writer(Protocol):
    """Takes tensors in any order, one at a time, from several threads."""

    def write(self, name: str, tensor: np.ndarray) -> None: ...


class Step(NamedTuple):
    """What becomes of some tensors.

    Fields:
        checkpoint: where they are.
        keys: their names there.
        make: from their values to one tensor.
        name: what that is called.
    """

    checkpoint: Checkpoint
    keys: tuple[str, ...]
    make: Callable[..., np.ndarray]
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(self.checkpoint.specs[key].nbytes for key in self.keys)


def in_order(steps: Iterable[Step]) -> list[Step]:
    """Steps as the bytes lie that they read: checkpoint by checkpoint, file by file."""
    steps = list(steps)
    numbers = {id(step.checkpoint): i for i, step in enumerate(steps)}
    return sorted(steps, key=lambda step: (numbers[id(step.checkpoint)], step.checkpoint.position(step.keys[0])))


def move(steps: Sequence[Step], writer: Writer, what: str, budget: int = _BUDGET) -> None:
    """Does all steps; what is read is read in their order. `what` names the bar that shows it.

    Raises:
        InputError: a tensor cannot be read, or `make` refuses it; the other threads stop.
    """
    with Bar(_megabytes(sum(step.nbytes for step in steps)), what, unit="MB") as bar:
        run = _Run(steps, writer, budget, bar)
        with ThreadPoolExecutor(_THREADS, "move") as pool:
            workers = [pool.submit(run.work) for _ in range(_THREADS)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                run.stop()


def _megabytes(size: int) -> int:
    return round(size / 1e6)


class _Run:
    """What the threads share: the steps that are left, the room that is left, the writer."""

    def __init__(self, steps: Iterable[Step], writer: Writer, budget: int, bar: Bar):
        self._steps, self._writer, self._room, self._bar = iter(steps), writer, _Room(budget), bar
        self._reading, self._writing, self._done, self._stopped = threading.Lock(), threading.Lock(), 0, False

    def stop(self) -> None:
        """No further step is begun."""
        self._stopped = True
        self._room.open()

    def work(self) -> None:
        """Does steps until there are none."""
        try:
            while found := self._next():
                step, tensors = found
                del found
                made = step.make(*tensors)
                del tensors
                self._write(step, made)
                del made
                self._room.leave(2 * step.nbytes)
        except BaseException:
            self.stop()
            raise

    def _next(self) -> tuple[Step, list[np.ndarray]] | None:
        """A step with its tensors, which are read in order, by one thread at a time."""
        with self._reading:
            step = next(self._steps, None)
            if step is None or self._stopped:
                return None
            self._room.enter(2 * step.nbytes)  # the tensors and what is made of them
            return step, [step.checkpoint.read(key) for key in step.keys]

    def _write(self, step: Step, tensor: np.ndarray) -> None:
        with self._writing:
            if not self._stopped:
                self._writer.write(step.name, tensor)
                before, self._done = _megabytes(self._done), self._done + step.nbytes
                self._bar.update(_megabytes(self._done) - before)


class _Room:
    """Bytes that may be in memory together; who does not fit waits, unless there is nobody else."""

    def __init__(self, size: int):
        self._size, self._held, self._changed, self._opened = size, 0, threading.Condition(), False

    def enter(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._size or self._opened)
            self._held += size

    def leave(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def open(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._opened = True
            self._changed.notify_all()
