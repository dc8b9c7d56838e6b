"""A model's folder as the Hugging Face hub has it: which files hold its tensors."""

from collections.abc import Mapping
from pathlib import Path

from pivotjax.errors import InputError
from pivotjax.files import read_json, within

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"


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
