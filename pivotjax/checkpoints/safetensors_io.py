"""Tensors of a Hugging Face folder: `model.safetensors`, or shards with `model.safetensors.index.json`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pivotjax.errors import InputError
from pivotjax.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """A lazy mapping from tensor name to array (bfloat16 included); one tensor is read at a time."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files = shard_files(self.folder)
        self._opened = [_open(file) for file in self.files]
        self._where = {name: file for file in self._opened for name in file.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order; InputError if there are none or a shard is missing."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map") or {}
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            named = ", ".join(absent) or "no shard at all"
            raise InputError(f"{index} names shards that are not there ({named}); get the model again")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a model folder in safetensors format")


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}); get it again") from error
