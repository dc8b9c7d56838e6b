"""A model's folder as the Hugging Face hub has it: which files hold its tensors."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pivotjax import files
from pivotjax.errors import InputError
from pivotjax.files import read_json, within

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"
_DTYPE = ("torch_dtype", "dtype")  # fields of config.json; transformers' older and newer name
_SMALL = 64_000_000  # bytes; larger files beside a model are not copied
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
_OURS = ("README.md", "config.yaml", "merge_report.json", INDEX, PICKLED_INDEX)


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files that hold a folder's tensors, safetensors before pickles, and the index: tensor name -> file name.

    InputError if there are none, if a shard is missing, or if the index is broken or names a file outside the folder.
    """
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / index).exists():
            return _indexed(folder, within(folder, index))
        if (folder / single).is_file():
            return [within(folder, single)], None
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX} (nor {PICKLED}); give a model's folder")


def holds_weights(folder: Path) -> bool:
    """Whether there are such files."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX))


def _indexed(folder: Path, index: Path) -> tuple[list[Path], Mapping[str, str]]:
    said = read_json(index)
    where = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{index} does not say in which file each tensor is (weight_map); get the model again")
    shards = [within(folder, name) for name in sorted(set(where.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent or not shards:
        named = ", ".join(absent) or "no shard at all"
        raise InputError(f"{index} names shards that are not there ({named}); get the model again")
    return shards, where


def copy_small_files(
    source: Path, folder: Path, dtype: str | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Copies config, tokenizer and the like from a model's folder; returns notes on what was left behind.

    What is in `folder` already stays. `dtype`: what config.json is to say now. `wanted` chooses among the names.
    """
    if not source.is_dir():
        return []
    notes = []
    for path in sorted(source.iterdir()):
        unwanted = path.name in _OURS or path.suffix in _WEIGHTS or path.name.startswith(".")
        if unwanted or not wanted(path.name) or (folder / path.name).exists() or not path.is_file():
            continue
        within(source, path.name)
        if path.stat().st_size > _SMALL:
            notes.append(f"{path.name} is large and was not copied")
        elif path.name == CONFIG and dtype is not None:
            config = read_json(path)
            write_config(folder, with_dtype(config, dtype) if isinstance(config, dict) else config)
        else:
            shutil.copyfile(path, folder / path.name)
    return notes


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A model's config that names the dtype of its weights now; those of its parts too, where they name one."""
    words = [word for word in _DTYPE if word in config] or [_DTYPE[0]]
    parts = {
        key: with_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, dict) and any(word in value for word in _DTYPE)
    }
    return {**config, **parts, **dict.fromkeys(words, dtype)}


def write_config(folder: Path, config: Any) -> None:
    """Writes config.json as transformers does."""
    files.write_bytes(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
