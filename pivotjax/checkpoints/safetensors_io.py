"""Tensors of a Hugging Face folder: `model.safetensors`, or shards with `model.safetensors.index.json`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pivotjax.checkpoints.folders import weight_files
from pivotjax.errors import InputError


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """A lazy mapping from tensor name to array (bfloat16 included); one tensor is read at a time."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files = weight_files(self.folder)[0]
        self._opened = [_open(file) for file in self.files]
        self._where = {name: file for file in self._opened for name in file.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}); get it again") from error
