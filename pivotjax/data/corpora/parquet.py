"""Hugging Face parquet: a column of pictures (`{bytes, path}`, or bytes alone) and one of captions.

A picture cannot be read by itself: its whole row group is, and the last few are kept. Shuffled reading therefore wants
small row groups (`datasets` writes 100 pictures in one); `arrayrecord.write` makes single records of others.
"""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pivotjax.data.corpora import base
from pivotjax.data.corpora.opened import Opened, is_remote, open_stream, stamp
from pivotjax.data.decode import MOST_BYTES, BadSample
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.progress import say

_IMAGES = ("image", "jpg", "png", "img", "image_bytes")
_CAPTIONS = ("caption", "text", "txt", "TEXT")
_MOST_OPEN = 64
_KEPT_BYTES = 512 << 20  # of row groups, in each process
_KEPT_CAPTIONS = 64  # row groups
_LARGE = 64 << 20  # bytes of a row group that makes shuffled reading slow


class _Shape(NamedTuple):
    """Of one file: rows of each row group, bytes of the largest, names and types of the columns."""

    rows: tuple[int, ...]
    largest: int
    columns: dict[str, str]
    size: int


@dataclass(frozen=True)
class ParquetCorpus:
    """Fields:
    files, places, ends: place g is (file, row group); there are `ends[g]` rows up to its end.
    image, caption: names of the columns; `image` is `image.bytes` in a struct.
    """

    files: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]
    image: str
    caption_column: str
    identity: str
    lost: dict[str, int]
    groups: Opened
    captions: Opened

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Item:
        caption, key = self.caption(index), self._key(index)
        value = self._value(index, self.groups, self.image)
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadSample("missing image", key)
        if len(data) > MOST_BYTES:
            raise BadSample("absurd size", f"{key} has {len(data)} bytes")
        return base.make_item(key, caption, data)

    def caption(self, index: int) -> str:
        value = self._value(index, self.captions, self.caption_column)
        return base.checked_caption(value, self._key(index))

    def _place(self, index: int) -> tuple[str, int, int]:
        """File, row group and row of a sample."""
        index = base.checked_index(index, len(self))
        number = bisect_right(self.ends, index)
        file, group = self.places[number]
        return self.files[file], group, index - (self.ends[number - 1] if number else 0)

    def _key(self, index: int) -> str:
        file, group, row = self._place(index)
        return f"{Path(file).stem}/{group}/{row}"

    def _value(self, index: int, kept: Opened, column: str) -> Any:
        file, group, row = self._place(index)
        try:
            return kept.get(file, group, column)[row].as_py()
        except (OSError, ValueError, IndexError) as error:  # pyarrow's errors are these
            raise BadSample("unreadable shard", f"row group {group} of {file}: {error}") from error


class _File:
    """A parquet file for several threads."""

    def __init__(self, path: str):
        self._file, self._lock = _parquet(path), threading.Lock()

    def column(self, group: int, name: str):
        with self._lock:
            return self._file.read_row_group(group, columns=[name], use_threads=False).column(0)


def _column(files: Opened[_File], file: str, group: int, name: str):
    """A column of one row group, as pyarrow has it."""
    return files.get(file).column(group, name)


def _parquet(path: str):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError('reading parquet needs pyarrow: pip install "pivotjax[parquet]"') from error
    try:
        return parquet.ParquetFile(open_stream(path)) if is_remote(path) else parquet.ParquetFile(path, memory_map=True)
    except ValueError as error:  # ArrowInvalid
        raise OSError(f"not a whole parquet file: {error}") from error


def _look(path: str) -> _Shape:
    size, _ = stamp(path)
    file = _parquet(path)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    columns = {field.name: str(field.type) for field in file.schema_arrow}
    largest = max((group.total_byte_size for group in groups), default=0)
    return _Shape(tuple(group.num_rows for group in groups), largest, columns, size)


def _open(config: base.CorpusConfig, cache: Path) -> ParquetCorpus:
    files = base.find_files(config.path, (".parquet",), "parquet file")
    shapes, lost = base.survey(files, _look, config)
    first, columns = next((name, shape.columns) for name, shape in shapes.items())
    image, caption = _chosen(config.image, _IMAGES, columns, first), _chosen(config.caption, _CAPTIONS, columns, first)
    for name, shape in shapes.items():
        if any(shape.columns.get(column) != columns[column] for column in (image, caption)):
            raise InputError(f"{name} has other columns than {first}; give files of one dataset")
    if columns[image] not in ("binary", "large_binary") and not columns[image].startswith("struct<bytes: binary"):
        raise InputError(f"column {image} of {first} is {columns[image]}; pictures must be binary, or {{bytes, path}}")
    largest = max(shape.largest for shape in shapes.values())
    if largest > _LARGE:
        size = f"row groups of up to {largest >> 20} MB"
        say(f"{config.path} has {size}: reading it shuffled is slow; write it as ArrayRecord first (docs/data.md)")
    places = [(number, group) for number, shape in enumerate(shapes.values()) for group in range(len(shape.rows))]
    rows = [count for shape in shapes.values() for count in shape.rows]
    load = partial(_column, Opened(_File, _MOST_OPEN))
    return ParquetCorpus(
        files=tuple(shapes),
        places=tuple(places),
        ends=tuple(accumulate(rows)) or (0,),
        image=f"{image}.bytes" if columns[image].startswith("struct") else image,
        caption_column=caption,
        identity=base.identity(config, zip(base.short_names(list(shapes)), (shape.size for shape in shapes.values()))),
        lost=lost,
        groups=Opened(load, max(1, min(64, _KEPT_BYTES // max(largest, 1)))),
        captions=Opened(load, _KEPT_CAPTIONS),
    )


def _chosen(wanted: str | None, usual: Sequence[str], columns: dict[str, str], where: str) -> str:
    found = [name for name in ([wanted] if wanted else usual) if name in columns]
    if not found:
        known = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise InputError(f"{where} has no column {wanted or ' or '.join(usual)}; name one of {known}"[:500])
    return found[0]


FORMAT = base.Format("parquet", _open)
