"""WebDataset: tar shards with KEY.jpg, KEY.txt and KEY.json one after the other, as img2dataset writes CC12M.

A shard's headers are read once; where its members are is kept in the cache, so that later a sample is one read at the
right place. https://github.com/webdataset/webdataset, https://github.com/rom1504/img2dataset
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pivotjax.data.corpora import base, tar
from pivotjax.data.corpora.opened import LocalFile, Opened, RemoteFile, open_ranges, open_stream, stamp, why
from pivotjax.data.corpora.tables import Table, write_column
from pivotjax.data.decode import MOST_BYTES, BadSample
from pivotjax.data.sources.base import Item
from pivotjax.files import atomic_path
from pivotjax.progress import say

_INDEX = 1  # part of every index's name: raise it when the layout changes
_PICTURES = frozenset("jpg jpeg jpe png webp gif bmp tif tiff jp2 avif ppm".split())
_NAME = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key, and after its first dot the extension
_NUMBERS = ("image", "image_size", "text", "text_size")  # columns; a size of -1: there is no such member
_MOST_OPEN = 128
_LONGEST_JSON = 1 << 20


@dataclass(frozen=True)
class WebDataset:
    """Fields:
    shards: paths of the tar files.
    field: None where captions are texts of their own, else the key of the JSON that has them.
    table: where the members of every sample are: `shard`, `key`, `image`, `image_size`, `text`, `text_size`.
    """

    shards: tuple[str, ...]
    field: str | None
    table: Table
    identity: str
    lost: dict[str, int]
    files: Opened[LocalFile | RemoteFile]

    def __len__(self) -> int:
        return len(self.table["shard"])

    def __getitem__(self, index: int) -> Item:
        row = base.checked_index(index, len(self))
        key, caption = self._key(row), self.caption(row)
        size = self.table["image_size"][row]
        if size < 0:
            raise BadSample("missing image", key)
        if size > MOST_BYTES:
            raise BadSample("absurd size", f"{key} has {size} bytes")
        return base.make_item(key, caption, self._read(row, "image"))

    def caption(self, index: int) -> str:
        row = base.checked_index(index, len(self))
        key, size = self._key(row), self.table["text_size"][row]
        if size < 0:
            raise BadSample("empty caption", key)
        if size > (base.LONGEST_CAPTION if self.field is None else _LONGEST_JSON):
            raise BadSample("broken record", f"{key}: its caption has {size} bytes")
        text = self._read(row, "text")
        return base.checked_caption(text if self.field is None else _field(text, self.field, key), key)

    def _key(self, row: int) -> str:
        """Shard and key: keys are unique within their shard only."""
        shard = self.shards[self.table["shard"][row]].rsplit("/", 1)[-1].removesuffix(".tar")
        return f"{shard}/{self.table.text('key', row).decode('utf-8', 'replace')}"

    def _read(self, row: int, part: str) -> bytes:
        shard, size = self.shards[self.table["shard"][row]], int(self.table[f"{part}_size"][row])
        try:
            data = self.files.get(shard).read(int(self.table[part][row]), size)
        except OSError as error:
            raise BadSample("unreadable shard", f"{shard}: {why(error)}") from error
        if len(data) < size:
            raise BadSample("unreadable shard", f"{shard} has become shorter")
        return data


def _field(data: bytes, field: str, key: str) -> object:
    try:
        record = json.loads(data)
        return record.get(field) if isinstance(record, dict) else {}
    except (ValueError, RecursionError) as error:
        raise BadSample("broken record", f"{key}: its JSON is damaged") from error


class _Shard(NamedTuple):
    """A shard's index file, the stamp of the tar it is of, its own SHA-256, samples, bytes of keys, what is wrong with
    the tar as it was indexed, why it cannot be reached now."""

    index: Path
    stamp: str
    digest: str
    samples: int
    key_bytes: int
    problem: str
    absent: str = ""


def _open(config: base.CorpusConfig, cache: Path) -> WebDataset:
    wanted = config.caption or "txt"
    extension, field = ("json", wanted[5:]) if wanted.startswith("json.") else (wanted.lower(), None)
    files = base.find_files(config.path, (".tar",), "tar shard")
    found, lost = base.survey(files, partial(_indexed, extension=extension, folder=cache / "corpora" / "tar"), config)
    shards = tuple(found)
    lost = _damage(config.path, found, lost)
    table = _joined(list(found.values()), cache / "corpora")
    identity = base.identity(config, zip(base.short_names(shards), (shard.digest for shard in found.values())))
    return WebDataset(shards, field, table, identity, lost, Opened(open_ranges, _MOST_OPEN))


def _damage(path: str, found: dict[str, _Shard], lost: dict[str, int]) -> dict[str, int]:
    """Says which shards end early and which cannot be reached now, and counts them."""
    told = {
        "have lost their ends, what is whole is used": [name for name, shard in found.items() if shard.problem],
        "cannot be read now, their samples count as bad": [name for name, shard in found.items() if shard.absent],
    }
    for what, names in told.items():
        if names:
            first = found[names[0]]
            why_first = f"{names[0]}: {first.problem or first.absent} ({first.samples} samples)"
            say(f"{len(names)} shards of {path} {what}; {why_first}")
    count = lost.get("unreadable shard", 0) + sum(map(len, told.values()))
    return {"unreadable shard": count} if count else lost


def _indexed(path: str, extension: str, folder: Path) -> _Shard:
    """The index of one shard, out of the cache if the shard is still the same. OSError where it cannot be read.

    A shard that cannot be reached now but could before keeps its place, so that samples keep their numbers: reading
    them raises BadSample.
    """
    index = folder / f"{hashlib.sha256(f'{_INDEX} {extension} {path}'.encode()).hexdigest()[:32]}.npz"
    try:
        size, version = stamp(path)
    except OSError as error:
        if not index.is_file():
            raise
        return _load(index)._replace(problem="", absent=why(error))
    now = f"{size} {version}"
    if index.is_file() and (known := _load(index)).stamp == now:
        return known
    _write_index(index, now, size, path, extension)
    return _load(index)


def _load(index: Path) -> _Shard:
    with np.load(index) as saved:
        about = {name: str(saved[name]) for name in ("stamp", "digest", "problem")}
        samples, key_bytes = saved["counts"].tolist()
    return _Shard(index, about["stamp"], about["digest"], samples, key_bytes, about["problem"])


def _write_index(index: Path, now: str, size: int, path: str, extension: str) -> None:
    """Reads a shard's headers. OSError where it cannot be read, or where its very beginning is no archive."""
    samples: list[dict] = []
    problem = ""
    with open_stream(path) as file:
        try:
            for sample in _samples(tar.members(file, size), extension):
                samples.append(sample)
        except tar.CutShort as error:
            problem = str(error)
    if problem and not samples:
        raise OSError(f"not a tar archive, or damaged from the start: {problem}")
    numbers = {name: np.array([sample[name] for sample in samples], np.int64) for name in _NUMBERS}
    keys = b"".join(sample["key"] for sample in samples)
    sizes = np.array([len(sample["key"]) for sample in samples], np.int64)
    digest = hashlib.sha256(b"".join([keys, *(column.tobytes() for column in numbers.values())])).hexdigest()
    with atomic_path(index) as temporary, open(temporary, "wb") as out:
        about = {"stamp": now, "digest": digest, "problem": problem, "counts": [len(samples), len(keys)]}
        np.savez(out, **about, **numbers, key=np.frombuffer(keys, np.uint8), key_sizes=sizes)


def _samples(members: Iterator[tar.Member], extension: str) -> Iterator[dict]:
    """Members that follow one another under one key are a sample; of several pictures the first counts.

    Where the archive is cut short, the sample before the cut is kept only with both its picture and its caption.
    """
    sample: dict = {}
    try:
        for member in members:
            match = _NAME.fullmatch(member.name)
            if match is None:
                continue
            if match[1] != sample.get("key"):
                if sample:
                    yield sample
                sample = dict.fromkeys(_NUMBERS, -1) | {"key": match[1]}
            kind = match[2].lower().decode("utf-8", "replace")
            part = "image" if kind in _PICTURES else "text" if kind == extension else None
            if part and sample[f"{part}_size"] < 0:
                sample |= {part: member.start, f"{part}_size": member.size}
    except tar.CutShort:
        if sample.get("image_size", -1) >= 0 and sample["text_size"] >= 0:
            yield sample
        raise
    if sample:
        yield sample


def _joined(shards: Sequence[_Shard], folder: Path) -> Table:
    """The samples of all shards as one table in the cache: 12 million take about 600 MB there, and no memory."""
    digest = hashlib.sha256(json.dumps([(shard.index.stem, shard.stamp) for shard in shards]).encode()).hexdigest()
    path, total = folder / f"webdataset-{digest[:32]}", sum(shard.samples for shard in shards)
    if not path.is_dir():
        with atomic_path(path, keep=True) as temporary:
            temporary.mkdir()
            for name in _NUMBERS:
                write_column(temporary, name, np.int64, (_column(shard, name) for shard in shards), total)
            numbers = (np.full(shard.samples, number) for number, shard in enumerate(shards))
            write_column(temporary, "shard", np.int32, numbers, total)
            key_bytes = sum(shard.key_bytes for shard in shards)
            write_column(temporary, "key", np.uint8, (_column(shard, "key") for shard in shards), key_bytes)
            write_column(temporary, "key.ends", np.int64, _ends(shards), total)
    return Table(path)


def _column(shard: _Shard, name: str) -> np.ndarray:
    with np.load(shard.index) as saved:
        return saved[name]


def _ends(shards: Sequence[_Shard]) -> Iterator[np.ndarray]:
    before = 0
    for shard in shards:
        yield before + np.cumsum(_column(shard, "key_sizes"))
        before += shard.key_bytes


FORMAT = base.Format("webdataset", _open)
