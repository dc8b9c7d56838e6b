"""Batches made ahead by threads or by worker processes, addressed by step; worker processes that die are replaced."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags
from PIL import Image

from pivotjax.data.shared import Batches, Receiver, Sent
from pivotjax.errors import InputError
from pivotjax.progress import say

_THREADS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # whole batches read ahead in this process
_IN_WORKER = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # a worker makes one batch at a time ...
_AHEAD = 2  # ... and has so many ready
_BLOCKS = 32  # of memory that Pillow keeps in a worker instead of asking for them picture by picture
_RESTARTS = 3  # times that workers are replaced within a run
_DIED = "Worker process was terminated unexpectedly"  # how grain's error begins


class Ahead(Iterator[Any]):
    """Iterates over `batches[step]`, `batches[step + 1]`, ..., made ahead; `close()` ends the worker processes.

    Batches, dictionaries of arrays, come in order whatever makes them. When a worker process dies (out of memory, say),
    all of them are started again at the step that is due, and a line says so; after three times InputError.

    Args:
        batches: random access, picklable.
        step: the first.
        workers: processes; 0: threads of this one.
    """

    def __init__(self, batches: Batches, step: int, workers: int):
        self._batches, self._step, self._workers, self._deaths = batches, step, workers, 0
        self._start()

    def __next__(self) -> Any:
        while True:
            try:
                batch = next(self._iterator)
                self._step += 1
                return self._receiver.open(batch) if self._workers else batch
            except RuntimeError as error:
                if not str(error).startswith(_DIED):
                    raise
                self._replace_workers(str(error))

    def close(self) -> None:
        """Ends worker processes and threads; the iterator cannot be used after it."""
        self._closing()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self) -> None:
        self._iterator, self._receiver = self._made_iterator(), Receiver()
        self._closing = weakref.finalize(self, _close, self._iterator, self._receiver)  # at the interpreter's end, too

    def _made_iterator(self) -> grain.DatasetIterator:
        source = Sent(self._batches) if self._workers else self._batches
        due = grain.MapDataset.source(source)[self._step :]
        if not self._workers:
            return iter(due.to_iter_dataset(_THREADS))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks for flags of its own; only absl's programs have read theirs
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_AHEAD)
        return iter(due.to_iter_dataset(_IN_WORKER).mp_prefetch(options, worker_init_fn=_prepare_worker))

    def _replace_workers(self, error: str) -> None:
        self._deaths += 1
        self.close()
        how = error.removeprefix(_DIED).split(".")[0].strip()
        if self._deaths > _RESTARTS:
            raise InputError(
                f"input workers died {self._deaths} times, the last one {how}; "
                "give the machine more memory (and shared memory), or set data.workers lower"
            )
        say(f"an input worker died {how} at step {self._step}; starting the workers again")
        self._start()


def _close(iterator: grain.DatasetIterator, receiver: Receiver) -> None:
    iterator.close()
    receiver.close()


def _prepare_worker(index: int, count: int) -> None:
    """In a worker process: the parent alone handles Ctrl-C, and no worker outlives it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one core
    Image.core.set_blocks_max(_BLOCKS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
