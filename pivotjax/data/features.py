"""The frozen encoder's features, computed once and kept on disk; training and evaluation read them, not images."""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float16, Float32

from pivotjax.data.images import render
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.files import atomic_path
from pivotjax.models import vision
from pivotjax.progress import Bar

_FORMAT = 1  # part of every file's name: raise it when rendering or the record layout changes
_WRITER = "group_size:1,uncompressed"  # random access; float16 noise does not compress
_READER = "readahead_buffer_size:0,max_parallelism:0"  # the same
_RENDERERS = 2  # threads, each one batch ahead


class Sample(TypedDict):
    """One captioned image as the pipeline sees it; `features` is [visual tokens, channels]."""

    features: Float32[np.ndarray, "V C"]
    caption: str
    concept: str
    key: str


def build(name: str, items: Sequence[Item], encoder: vision.Encoder, folder: Path, batch: int = 32) -> Path:
    """Renders and encodes `items` into an ArrayRecord of their samples, in order; returns its path.

    The file is named by a hash of all that it depends on (encoder, items), appears only when complete, and is reused.
    InputError on no items, a picture that cannot be read, or a folder that cannot be written.
    """
    if not items:
        raise InputError(f"{name} has no items to encode; choose another domain or larger limits")
    path = Path(folder) / f"{name}-{_fingerprint(items, encoder)}.arrayrecord"
    if path.exists() and _count(path) == len(items):
        return path
    with atomic_path(path) as temporary, Bar(len(items), f"encode {name}", unit="image") as bar:
        _write(temporary, _encoded(items, encoder, batch), bar)
    return path


@dataclass(frozen=True)
class FeatureSource:
    """Random access to the samples of one file, for grain; opened on first use, so that it travels to other processes.

    `name` is the domain's: the pipeline derives the order of the stream from it.
    """

    path: Path
    name: str

    @cached_property
    def _reader(self) -> ArrayRecordReader:
        return _open(self.path)

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; InputError where the file is truncated or damaged."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is outside the {len(self)} samples of {self.path}")
        try:
            return _unpack(self._reader.read([index % len(self)])[0])
        except (RuntimeError, ValueError, KeyError) as error:
            raise _damaged(self.path) from error

    def __getstate__(self) -> dict:
        return {"path": self.path, "name": self.name}  # an open reader stays behind

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def _encoded(
    items: Sequence[Item], encoder: vision.Encoder, batch: int
) -> Iterator[tuple[Item, Float16[np.ndarray, "V C"]]]:
    """Items with their features. Threads render the next batches while the encoder, which needs no GIL, runs."""
    batches = [items[start : start + batch] for start in range(0, len(items), batch)]
    with ThreadPoolExecutor(_RENDERERS) as pool:
        try:
            ahead = deque(pool.submit(_images, group, batch, encoder.image_size) for group in batches[:_RENDERERS])
            for number, group in enumerate(batches):
                images = ahead.popleft().result()
                if number + _RENDERERS < len(batches):
                    ahead.append(pool.submit(_images, batches[number + _RENDERERS], batch, encoder.image_size))
                features = np.asarray(vision.encode(encoder, images)).astype(np.float16)
                yield from zip(group, features)  # the padding of the last batch falls off here
        finally:
            pool.shutdown(cancel_futures=True)


def _images(items: Sequence[Item], batch: int, size: int) -> np.ndarray:
    """uint8 [batch, size, size, 3]; blank where there are fewer items, so that the encoder compiles once."""
    images = np.zeros((batch, size, size, 3), np.uint8)
    for place, item in enumerate(items):
        images[place] = render(item, size)
    return images


def _write(path: Path, samples: Iterator[tuple[Item, np.ndarray]], bar: Bar) -> None:
    with _plain_errors():
        writer = ArrayRecordWriter(str(path), _WRITER)
    for item, features in samples:
        with _plain_errors():
            writer.write(_pack(item, features))
        bar.update()
    with _plain_errors():
        writer.close()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The record writer wraps the operating system's errors (a full disk) in RuntimeError: unwraps them."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from error


def _pack(item: Item, features: np.ndarray) -> bytes:
    """A line of JSON, then the features as little-endian float16."""
    about = {"key": item.key, "concept": item.concept, "caption": item.caption, "shape": features.shape}
    return json.dumps(about).encode() + b"\n" + features.astype("<f2").tobytes()


def _unpack(record: bytes) -> Sample:
    line, _, values = record.partition(b"\n")
    about = json.loads(line)
    features = np.frombuffer(values, "<f2").reshape(about.pop("shape")).astype(np.float32)
    return Sample(features=features, **about)


def _open(path: Path) -> ArrayRecordReader:
    if not Path(path).is_file():
        raise InputError(f"there are no features at {path}; encode the domain again")
    try:
        reader = ArrayRecordReader(str(path), _READER)
        if reader.num_records():
            return reader
    except RuntimeError as error:
        raise _damaged(path) from error
    raise _damaged(path)  # a file that lost its end has no index and reads as empty


def _count(path: Path) -> int:
    """Samples of the file, 0 where it is damaged."""
    try:
        return _open(path).num_records()
    except InputError:
        return 0


def _damaged(path: Path) -> InputError:
    return InputError(f"the features in {path} are truncated or damaged; delete the file and run again")


def _fingerprint(items: Sequence[Item], encoder: vision.Encoder) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {encoder.identity}".encode())
    for item in items:
        digest.update(json.dumps([item.key, item.concept, item.caption, item.kind]).encode() + item.image)
    return digest.hexdigest()[:16]
