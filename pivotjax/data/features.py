"""The frozen encoder's features, computed once and kept on disk; training and evaluation read them, not images."""

import bisect
import hashlib
import json
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import UInt8

from pivotjax.data.corpora import Corpus
from pivotjax.data.corpora.arrayrecord import plain_errors
from pivotjax.data.corpora.opened import Opened
from pivotjax.data.decode import BAD_LIMIT, BadSample, listed, too_many
from pivotjax.data.devices import replicated, shared_out
from pivotjax.data.images import render
from pivotjax.data.sources.base import Item
from pivotjax.data.stream import Sample
from pivotjax.errors import InputError
from pivotjax.files import atomic_path, output_folder, read_json, write_json
from pivotjax.models import vision
from pivotjax.progress import Bar, say

StoredType = Literal["float16", "bfloat16"]
Render = Callable[[Item, int], UInt8[np.ndarray, "S S 3"]]

_FORMAT = 1  # part of every file's name: raise it when rendering or the record layout changes
_WRITER = "group_size:1,uncompressed"  # random access; float16 noise does not compress
_READER = "readahead_buffer_size:0,max_parallelism:0"  # the same
_MOST_OPEN = 64  # shards, in a process
_TYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ABOUT = 400  # bytes of a record beside its features, roughly
_SHARD = ".arrayrecord"


def build(
    name: str,
    items: Sequence[Item],
    encoder: vision.Encoder,
    folder: Path,
    batch: int = 32,
    render: Render = render,
    variant: str = "",
) -> Path:
    """Renders and encodes `items` into an ArrayRecord of their samples, in order; returns its path.

    The file is named by a hash of all that it depends on (encoder, items and, where `render` is another than the usual,
    the `variant` that names it), appears only when complete, and is reused. InputError on no items, a picture that
    cannot be read, or a folder that cannot be written.
    """
    if not items:
        raise InputError(f"{name} has no items to encode; choose another domain or larger limits")
    path = Path(folder) / f"{name}-{_fingerprint(items, encoder, variant)}{_SHARD}"
    if path.exists() and _count(path) == len(items):
        return path
    encoder = encoder._replace(params=replicated(encoder.params))
    with atomic_path(path) as temporary, Bar(len(items), f"encode {name}", unit="image") as bar:
        bad = _write(temporary, _encoded(items, range(len(items)), encoder, render, batch), "float16", bar)
        if bad:
            place, reason = next(iter(bad.items()))
            raise InputError(f"cannot read the image of {items[place].key}: {reason}; fetch its package again")
    return path


def build_shards(
    name: str,
    corpus: Corpus,
    encoder: vision.Encoder,
    folder: Path,
    render: Render,
    *,
    variant: str = "",
    dtype: StoredType = "float16",
    batch: int = 32,
    shard: int = 4096,
    threads: int = 2,
    bad_limit: float = BAD_LIMIT,
) -> Path:
    """Renders and encodes a corpus of any size into a folder of ArrayRecords of `shard` samples each; returns it.

    A shard appears only when complete and is not made again: a run that was stopped goes on with the next one, and
    processes that have the folder in common share the work, each beginning at another shard. Bad samples are left out
    of the records and written down, with their reason, beside each shard. A shard with too many is not kept: a disk
    that was away for a while would be remembered as bad samples.

    Args:
        name: the domain's.
        corpus: what is encoded; its `identity` is part of the folder's name.
        encoder: the frozen encoder.
        folder: where the folder of shards is made.
        render: item and pixels of an edge -> picture; raises BadSample.
        variant: what distinguishes `render` from others, for the folder's name.
        dtype: type in which features are stored.
        batch: images encoded at once on each device of this host. Features depend on it, and on the number of devices,
            in their last digits at most.
        shard: samples a shard.
        threads: that render, each a batch ahead.
        bad_limit: share of samples that may be bad, of a shard as of all.

    Raises:
        InputError: the corpus is empty, too much of it or of a shard is bad, the disk has no room for it, or the
            folder cannot be written.
    """
    if not len(corpus):
        raise InputError(f"{name} has no samples to encode; choose another domain or larger limits")
    facts = f"{_FORMAT} {encoder.identity} {corpus.identity} {variant} {dtype} {shard}"
    path = output_folder(Path(folder) / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}")
    shards = math.ceil(len(corpus) / shard)
    first = jax.process_index() * shards // jax.process_count()  # where this process begins its round
    order = [number for number in [*range(first, shards), *range(first)] if not _is_whole(path, number)]
    ranges = {number: range(number * shard, min((number + 1) * shard, len(corpus))) for number in order}
    if not order:
        return path
    total = sum(map(len, ranges.values()))
    _check_room(name, path, total, encoder)
    encoder = encoder._replace(params=replicated(encoder.params))
    found, tried = Counter[str](), 0
    with Bar(total, f"encode {name}", unit="image") as bar:
        for number, indices in ranges.items():
            if _is_whole(path, number):  # another process has made it
                bar.update(len(indices))
                continue
            with atomic_path(path / f"{number:05}{_SHARD}") as temporary:
                bad = _write(temporary, _encoded(corpus, indices, encoder, render, batch, threads), dtype, bar)
                here = Counter(bad.values())
                found, tried = found + here, tried + len(indices)
                if found.total() == len(corpus) or too_many(found.total(), tried, bad_limit):
                    raise _spoilt(f"{tried} samples of {name}", found, bad_limit)
                if too_many(here.total(), len(indices), bad_limit):
                    raise _spoilt(f"the samples {indices[0]} to {indices[-1]} of {name}", here, bad_limit)
                write_json(path / f"{number:05}.json", {"samples": len(indices), "bad": bad})  # there before its shard
    return path


def _check_room(name: str, path: Path, samples: int, encoder: vision.Encoder) -> None:
    """Says what so many samples will take; InputError where the disk has no room for them."""
    need = samples * (2 * encoder.num_tokens * encoder.dim + _ABOUT)
    free = shutil.disk_usage(path).free
    if need > free:
        raise InputError(
            f"the features of {name} take {need / 1e9:.1f} GB, {path} has room for {free / 1e9:.1f} GB; "
            "give a larger disk by `cache`, or set data.features to online"
        )
    say(f"encode {name}: {samples} images, {need / 1e9:.2f} GB to write in {path}")


def _spoilt(what: str, bad: Counter[str], limit: float) -> InputError:
    return InputError(
        f"{bad.total()} of {what} are bad ({listed(bad.most_common())}), data.bad_limit is {limit}; mend the data or "
        "raise the limit, and run again: finished shards stay"
    )


def _is_whole(path: Path, number: int) -> bool:
    return (path / f"{number:05}{_SHARD}").exists()  # shards are renamed into place


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
        return _sample(self._reader, index % len(self), self.path)

    def key(self, index: int) -> str:
        """The sample's name."""
        return self[index]["key"]

    def __getstate__(self) -> dict:
        return {"path": self.path, "name": self.name}  # an open reader stays behind

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


class _Shard(NamedTuple):
    first: int  # number of its first sample
    samples: int  # the bad ones included
    path: Path
    bad: dict[int, str]  # by place in the shard
    places: list[int]  # the same places, ascending


@dataclass(frozen=True)
class ShardedFeatures:
    """Random access to the samples of a corpus, from the folder that `build_shards` made of it.

    Samples keep the numbers that they have in the corpus; `[i]` of a bad one raises BadSample, as the corpus does.
    """

    path: Path
    name: str

    @cached_property
    def _shards(self) -> list[_Shard]:
        found, first = [], 0
        for path in sorted(Path(self.path).glob("*.json")):
            about = read_json(path)
            bad = {int(place): reason for place, reason in about["bad"].items()}
            found.append(_Shard(first, about["samples"], path.with_suffix(_SHARD), bad, sorted(bad)))
            first += about["samples"]
        if not found:
            raise InputError(f"there are no features at {self.path}; encode the domain again")
        return found

    @cached_property
    def _readers(self) -> Opened[ArrayRecordReader]:
        return Opened(_open, _MOST_OPEN)

    def __len__(self) -> int:
        last = self._shards[-1]
        return last.first + last.samples

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; BadSample where it has none, InputError where a shard is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside the {len(self)} samples of {self.path}")
        shard = self._shards[bisect.bisect_right(self._shards, index, key=lambda one: one.first) - 1]
        place = index - shard.first
        if place in shard.bad:
            raise BadSample(shard.bad[place], f"sample {index} of {self.name}")
        return _sample(self._readers.get(shard.path), place - bisect.bisect_left(shard.places, place), shard.path)

    def key(self, index: int) -> str:
        """The sample's name; BadSample where it has none."""
        return self[index]["key"]

    def usable(self) -> "Chosen":
        """The samples that are not bad."""
        bad = {shard.first + place for shard in self._shards for place in shard.places}
        return Chosen(self, tuple(index for index in range(len(self)) if index not in bad))

    def dropped(self) -> dict[str, int]:
        """How many samples are bad, by reason."""
        return dict(Counter(reason for shard in self._shards for reason in shard.bad.values()))

    def __getstate__(self) -> dict:
        return {"path": self.path, "name": self.name}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Chosen:
    """Some of the samples of a source, by index."""

    source: ShardedFeatures
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """The domain's."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def key(self, index: int) -> str:
        """The sample's name."""
        return self[index]["key"]


class _Rendered(NamedTuple):
    images: UInt8[np.ndarray, "B S S 3"]  # blank behind the last item, so that the encoder compiles once
    items: list[Item | BadSample]


def _encoded(
    items: Sequence[Item] | Corpus,
    indices: range,
    encoder: vision.Encoder,
    render: Render,
    batch: int,
    threads: int = 2,
) -> Iterator[tuple[Item | BadSample, np.ndarray]]:
    """Items with their float32 features. While some are used, the devices work on the next ones."""
    dispatched = _dispatched(_rendered_ahead(items, indices, encoder.image_size, render, batch, threads), encoder)
    for (found, features), _ in pairwise(chain(dispatched, [None])):
        yield from zip(found, np.asarray(features))  # padding falls off here


def _dispatched(
    rendered: Iterator[_Rendered], encoder: vision.Encoder
) -> Iterator[tuple[list[Item | BadSample], jax.Array]]:
    """Items of a batch a device, with their features, which the devices may still work on."""
    devices = jax.local_device_count()
    while batches := list(islice(rendered, devices)):
        padding = [batches[0].images] * (devices - len(batches))
        images = np.concatenate([*(one.images for one in batches), *padding])
        yield [item for one in batches for item in one.items], vision.encode(encoder, shared_out(images))


def _rendered_ahead(
    items: Sequence[Item] | Corpus, indices: range, size: int, render: Render, batch: int, threads: int
) -> Iterator[_Rendered]:
    """Batches of pictures, each of them made by a thread while earlier ones are used."""
    groups = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    with ThreadPoolExecutor(threads) as pool:
        try:
            ahead = deque(pool.submit(_rendered, items, group, batch, size, render) for group in groups[:threads])
            for number in range(len(groups)):
                done = ahead.popleft().result()
                if number + threads < len(groups):
                    ahead.append(pool.submit(_rendered, items, groups[number + threads], batch, size, render))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


def _rendered(items: Sequence[Item] | Corpus, indices: range, batch: int, size: int, render: Render) -> _Rendered:
    images, found = np.zeros((batch, size, size, 3), np.uint8), []
    for place, index in enumerate(indices):
        try:
            item = items[index]
            images[place] = render(item, size)
        except BadSample as bad:
            item = bad
        found.append(item)
    return _Rendered(images, found)


def _write(
    path: Path, samples: Iterator[tuple[Item | BadSample, np.ndarray]], dtype: StoredType, bar: Bar
) -> dict[int, str]:
    """Writes the good samples; returns the places of the bad ones with their reasons."""
    bad: dict[int, str] = {}
    with plain_errors():
        writer = ArrayRecordWriter(str(path), _WRITER)
    for place, (item, features) in enumerate(samples):
        if isinstance(item, BadSample):
            bad[place] = item.reason
        else:
            with plain_errors():
                writer.write(_pack(item, features, dtype))
        bar.update()
    with plain_errors():
        writer.close()
    return bad


def _pack(item: Item, features: np.ndarray, dtype: StoredType) -> bytes:
    """A line of JSON, then the features, little-endian; float16 goes without saying."""
    about = {"key": item.key, "concept": item.concept, "caption": item.caption, "shape": features.shape}
    if dtype != "float16":
        about["dtype"] = dtype
    return json.dumps(about).encode() + b"\n" + features.astype(_TYPES[dtype]).tobytes()


def _unpack(record: bytes) -> Sample:
    """The sample, its features float32 or, where they are stored so, bfloat16."""
    line, _, values = record.partition(b"\n")
    about = json.loads(line)
    dtype = about.pop("dtype", "float16")
    features = np.frombuffer(values, _TYPES[dtype]).reshape(about.pop("shape"))
    return Sample(features=features.astype(np.float32) if dtype == "float16" else features, **about)


def _sample(reader: ArrayRecordReader, place: int, path: Path) -> Sample:
    """The sample at a place of an open file; InputError where the file is damaged."""
    try:
        return _unpack(reader.read([place])[0])
    except (RuntimeError, IndexError, ValueError, KeyError) as error:
        raise _damaged(path) from error


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


def _fingerprint(items: Sequence[Item], encoder: vision.Encoder, variant: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {encoder.identity}{variant}".encode())
    for item in items:
        digest.update(json.dumps([item.key, item.concept, item.caption, item.kind]).encode() + item.image)
    return digest.hexdigest()[:16]
