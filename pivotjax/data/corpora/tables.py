"""Columns of numbers and strings on disk, memory-mapped: millions of samples without a Python object each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib import format as npy


@dataclass(frozen=True)
class Table:
    """A folder with one .npy file a column. Opened where it is read, so that it travels to other processes."""

    folder: Path

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def text(self, column: str, row: int) -> bytes:
        """Row `row` of a column of strings: its bytes are in `column`, where each of them ends in `column.ends`."""
        ends = self._columns[f"{column}.ends"]
        return self._columns[column][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}

    def __reduce__(self):
        return Table, (self.folder,)


def write_column(folder: Path, name: str, dtype: type, pieces: Iterable[np.ndarray], length: int) -> None:
    """One column of `length` numbers, piece by piece: a full disk is an OSError, as it is not on mapped memory."""
    with open(folder / f"{name}.npy", "wb") as file:
        header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        npy.write_array_header_2_0(file, header)
        for piece in pieces:
            file.write(piece.astype(dtype, copy=False).tobytes())


def write_texts(folder: Path, name: str, texts: Sequence[bytes]) -> None:
    """One column of strings."""
    blob, ends = b"".join(texts), np.cumsum([len(text) for text in texts], dtype=np.int64)
    write_column(folder, name, np.uint8, [np.frombuffer(blob, np.uint8)], len(blob))
    write_column(folder, f"{name}.ends", np.int64, [ends], len(texts))
