"""Batches on their way out of a worker process: in shared memory that is used again and again.

Fresh shared memory costs several times what copying into it does, so that a worker keeps its blocks. The reader copies
a batch out and marks its block free; the worker takes the next free one, or makes one where there is none.
"""

import contextlib
import multiprocessing.util
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple, Protocol

import numpy as np

_FREE, _BUSY = 0, 1
_START = 64  # bytes before the first array, the mark among them; arrays begin at multiples of it


class Part(NamedTuple):
    """An array of a batch before it is put together: equal arrays, and the axes on which they stand."""

    arrays: Sequence[np.ndarray]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (*self.axes, *self.arrays[0].shape)

    def whole(self, out: np.ndarray | None = None) -> np.ndarray:
        """The arrays put together, in `out` where it is given."""
        flat = None if out is None else out.reshape(-1, *self.arrays[0].shape)
        return np.stack(self.arrays, out=flat).reshape(self.shape)


class Batches(Protocol):
    """Random access to batches, whole or in parts."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...

    def parts(self, step: int) -> dict[str, Part]:
        """The same batch, its arrays not put together yet."""
        ...


class Place(NamedTuple):
    """Where an array is in a block."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Parcel:
    """What travels instead of a batch: the name of a block and what is in it. Small enough for a pipe to take it whole
    or not at all, whenever its sender dies."""

    block: str
    places: dict[str, Place]


class Sent:
    """In a worker: `batches`, each as the parcel of a block of shared memory."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self._blocks: list[SharedMemory] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Parcel:
        batch = self._batches.parts(step)
        places, end = {}, _START
        for key, part in batch.items():
            places[key] = Place(end, part.shape, part.arrays[0].dtype)
            end += -(-len(part.arrays) * part.arrays[0].nbytes // _START) * _START
        block = self._free_block(end)
        for key, part in batch.items():
            part.whole(_view(block, places[key]))
        block.buf[0] = _BUSY
        return Parcel(block.name, places)

    def _free_block(self, size: int) -> SharedMemory:
        for block in self._blocks:
            if block.buf[0] == _FREE and block.size >= size:
                return block
        block = SharedMemory(create=True, size=size)
        self._blocks.append(block)
        multiprocessing.util.Finalize(None, _remove, (block,), exitpriority=0)
        return block

    def __getstate__(self) -> Batches:
        return self._batches

    def __setstate__(self, batches: Batches) -> None:
        self.__init__(batches)


class Receiver:
    """In the process that reads: parcels become batches of ordinary arrays."""

    def __init__(self):
        self._blocks: dict[str, SharedMemory] = {}

    def open(self, parcel: Parcel) -> dict[str, np.ndarray]:
        """A copy of what is in the parcel, whose block is free again."""
        if parcel.block not in self._blocks:
            self._blocks[parcel.block] = SharedMemory(parcel.block)
        block = self._blocks[parcel.block]
        batch = {key: np.array(_view(block, place)) for key, place in parcel.places.items()}
        block.buf[0] = _FREE
        return batch

    def close(self) -> None:
        """Removes the blocks, in case that their worker was killed before it did."""
        for block in self._blocks.values():
            _remove(block)
        self._blocks.clear()


def _view(block: SharedMemory, place: Place) -> np.ndarray:
    return np.ndarray(place.shape, place.dtype, buffer=block.buf, offset=place.offset)


def _remove(block: SharedMemory) -> None:
    block.close()
    with contextlib.suppress(FileNotFoundError):
        block.unlink()
