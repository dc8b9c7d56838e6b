"""LLaVA's JSON: a list of {"id", "image", "conversations"} beside a folder of pictures.

As in `blip_laion_cc_sbu_558k.json` and `chat.json` of LLaVA-Pretrain: the caption is what "gpt" says first.
https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivotjax.data.corpora import base
from pivotjax.data.corpora.opened import is_remote, open_ranges, open_stream, stamp, why
from pivotjax.data.corpora.tables import Table, write_column, write_texts
from pivotjax.data.decode import MOST_BYTES, REASONS, BadSample
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.files import atomic_path

_INDEX = 2  # part of every index's name: raise it when the layout changes
_SPEAKER = "gpt"


@dataclass(frozen=True)
class LlavaJson:
    """`table`: `image` (path below `folder`) and `caption` of every entry; `bad`: 0, or its reason's place in
    `REASONS` + 1."""

    folder: str
    table: Table
    identity: str
    lost: dict[str, int]

    def __len__(self) -> int:
        return len(self.table["bad"])

    def __getitem__(self, index: int) -> Item:
        row = base.checked_index(index, len(self))
        caption, key = self.caption(row), self._key(row)
        return base.make_item(key, caption, self._image(self._text("image", row), key))

    def caption(self, index: int) -> str:
        row = base.checked_index(index, len(self))
        key = self._key(row)
        if bad := int(self.table["bad"][row]):
            raise BadSample(REASONS[bad - 1], key)
        return base.checked_caption(self.table.text("caption", row), key)

    def _key(self, row: int) -> str:
        """Picture and number of the entry: pictures come again, and a mixture's begin with the name of their data set
        (coco/train2017/000000000009.jpg)."""
        image = self._text("image", row)
        return f"{image}/{row}" if image else str(row)

    def _text(self, column: str, row: int) -> str:
        return self.table.text(column, row).decode("utf-8", "replace")

    def _image(self, name: str, key: str) -> bytes:
        path = os.path.join(self.folder, name)
        try:
            if os.path.isabs(name) or not _inside(path, self.folder):
                raise BadSample("missing image", f"{key}: {name!r} leads out of {self.folder}")
            size, _ = stamp(path)
            if size > MOST_BYTES:
                raise BadSample("absurd size", f"{path} has {size} bytes")
            return open_ranges(path).read(0, size)
        except BadSample:
            raise
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            raise BadSample("missing image", f"{path}: {why(error)}") from error


def _inside(path: str, folder: str) -> bool:
    """Whether a path stays in its folder, links followed."""
    if is_remote(folder):
        return ".." not in path.split("/")
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def _open(config: base.CorpusConfig, cache: Path) -> LlavaJson:
    folder = config.images or os.path.dirname(config.path) or "."
    try:
        with open_stream(config.path) as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"cannot read {config.path}: {why(error)}; give LLaVA's JSON file") from error
    if not is_remote(folder) and not os.path.isdir(folder):
        raise InputError(f"there is no folder of pictures at {folder}; give it as `images` (unpack images.zip first)")
    speaker = config.caption or _SPEAKER
    identity = base.identity(config, [_INDEX, hashlib.sha256(data).hexdigest()])
    path = cache / "corpora" / f"llava-{identity[:32]}"
    if not path.is_dir():
        _write_table(path, _entries(data, config.path), speaker)
    return LlavaJson(folder, Table(path), identity, {})


def _entries(data: bytes, where: str) -> list:
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); get it again") from error
    if not isinstance(entries, list):
        raise InputError(f"{where} holds no list of conversations; give blip_laion_cc_sbu_558k.json or one like it")
    return entries


def _write_table(path: Path, entries: list, speaker: str) -> None:
    rows = [_row(entry, speaker) for entry in entries]
    with atomic_path(path, keep=True) as folder:
        folder.mkdir()
        for place, column in enumerate(("image", "caption")):
            write_texts(folder, column, [row[place].encode("utf-8", "replace") for row in rows])
        write_column(folder, "bad", np.uint8, [np.array([row[2] for row in rows])], len(rows))


def _row(entry: Any, speaker: str) -> tuple[str, str, int]:
    """Image, caption, and the reason why not."""
    broken, missing = (REASONS.index(reason) + 1 for reason in ("broken record", "missing image"))
    if not isinstance(entry, dict):
        return "", "", broken
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        return "", "", missing if image is None or image == "" else broken
    turns = entry.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    said = next((turn.get("value") for turn in turns if turn.get("from") == speaker), None)
    return (image, said, 0) if isinstance(said, str) else (image, "", broken)


FORMAT = base.Format("llava_json", _open)
