"""Tensors on disk by name, in torch's layout: read one at a time, written one at a time, never whole in memory.

Read: safetensors files, torch pickles (`.bin`, `.pt`, `.pth`; of the older layout they are read whole), folders with
one or with shards of either kind and their index. Written: safetensors, in one file or in shards with an index. A
safetensors file is 8 bytes (little-endian length of the header), a JSON header `{name: {dtype, shape, data_offsets}}`,
and the tensors' bytes without gaps; headers are checked before a byte of data is believed.
"""

import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pivotjax import files
from pivotjax.checkpoints import folders, pickles
from pivotjax.errors import InputError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
_BLOCK = 1 << 24
_ALIGNMENT = 64  # bytes; JAX then uses the memory as it is
PICKLES = (".bin", ".pt", ".pth")


class Spec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    """Where a tensor's bytes lie; `strides` (in elements) where they are in another order than its values."""

    file: "_File"
    begin: int
    end: int
    strides: tuple[int, ...] | None = None
    crc: int | None = None


class _File:
    """An open file that hashes itself while it is read: what is read in order is hashed on the way, by a thread."""

    def __init__(self, path: Path, hashed: bool):
        self.path, self._hashes = path, hashed
        try:
            self._handle = open(path, "rb", buffering=0)
            self.size = os.fstat(self._handle.fileno()).st_size
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        self._sha, self._hashed = hashlib.sha256(), 0
        self._hasher, self._hashing = ThreadPoolExecutor(1, "hash"), Future()
        self._hashing.set_result(None)
        self._order = threading.Lock()

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes `[begin, end)` as aligned uint8."""
        room = np.empty(end - begin + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        data = room[start : start + end - begin]
        rest, position = memoryview(data), begin
        while rest:
            try:
                got = os.preadv(self._handle.fileno(), [rest], position)
            except OSError as error:
                raise InputError(f"cannot read {self.path}: {error.strerror}") from error
            if not got:
                raise InputError(f"{self.path} became shorter while it was read; get it again")
            rest, position = rest[got:], position + got
        with self._order:
            if self._hashes and begin == self._hashed:
                self._hashing.result()  # one piece waits at most
                self._hashing, self._hashed = self._hasher.submit(self._sha.update, data), end
        return data

    def sha256(self) -> str:
        """Of the whole file; what has not been read in order is read now."""
        self._hashes = True
        while self._hashed < self.size:
            self.read(self._hashed, min(self._hashed + _BLOCK, self.size))
        self._hashing.result()
        return self._sha.hexdigest()

    def close(self) -> None:
        self._hasher.shutdown()
        self._handle.close()


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors by name, from one or more files; a mapping that reads when it is asked. A context manager.

    Several threads may read. One that reads in the order of the bytes (`position`) has the files hashed on the way if
    they were opened so.
    """

    def __init__(self, path: Path, specs: dict[str, Spec], places: dict[str, _Place], opened: list[_File]):
        self.path, self.specs = path, specs
        self._places, self._files = places, opened

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The files' names and the tensors in each, in the order of their bytes."""
        held: dict[str, list[str]] = {file.path.name: [] for file in self._files}
        for name in sorted(self.specs, key=self.position):
            held[self._places[name].file.path.name].append(name)
        return {file: tuple(names) for file, names in held.items()}

    def position(self, name: str) -> tuple[int, int]:
        """Sorts tensors as their bytes lie: number of the file, first byte."""
        place = self._places[name]
        return self._files.index(place.file), place.begin

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own, aligned for JAX."""
        place, (dtype, shape) = self._places[name], self.specs[name]
        data = place.file.read(place.begin, place.end)
        if place.crc is not None and zlib.crc32(data) != place.crc:
            raise InputError(f"{place.file.path}: the bytes of {name!r} are damaged (CRC-32); get the file again")
        if place.strides is None:
            return data.view(dtype).reshape(shape)
        return np.asarray(pickles.strided(data.view(dtype), shape, place.strides), order="C")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    __eq__, __hash__ = object.__eq__, object.__hash__  # an open file, not what is in it

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {file.path.name: file.sha256() for file in self._files}

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Memory(Checkpoint):
    """Tensors that are in memory already, read from one file."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray], sha256: str):
        specs = {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        super().__init__(path, specs, {}, [])
        self._tensors, self._sha256, self._order = dict(tensors), sha256, {name: i for i, name in enumerate(tensors)}

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        return {self.path.name: tuple(self._tensors)}

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._order[name]

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def digests(self) -> dict[str, str]:
        return {self.path.name: self._sha256}


def open_checkpoint(path: Path, hashed: bool = True) -> Checkpoint:
    """Opens a file or folder of tensors; InputError if it is missing, truncated or lies about itself.

    `hashed`: its SHA-256 will be asked for, so what is read is hashed at once.
    """
    path = Path(path)
    if path.is_dir():
        return _open_files(path, *folders.weight_files(path), hashed)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give a safetensors file, a model folder, or a torch .bin file")
    if path.suffix in PICKLES and pickles.find_tensors(path) is None:
        return Memory(path, pickles.read_state_dict(path), files.sha256(path))
    return _open_files(path, [path], None, hashed)


def _open_files(path: Path, shards: list[Path], index: Mapping[str, str] | None, hashed: bool) -> Checkpoint:
    specs: dict[str, Spec] = {}
    places: dict[str, _Place] = {}
    opened: list[_File] = []
    try:
        for shard in shards:
            file = _File(shard, hashed)
            opened.append(file)
            found, within = _pickled(file) if shard.suffix in PICKLES else _header(file)
            twice = next((name for name in found if name in specs), None)
            if twice:
                raise InputError(f"{shard} and {places[twice].file.path} both hold {twice!r}; get the model again")
            specs |= found
            places |= within
        _check_index(path, specs, places, index)
        return Checkpoint(path, specs, places, opened)
    except BaseException:
        for file in opened:
            file.close()
        raise


def _check_index(
    path: Path, specs: Mapping[str, Spec], places: Mapping[str, _Place], index: Mapping[str, str] | None
) -> None:
    for name, shard in (index or {}).items():
        if name not in specs or places[name].file.path.name != shard:
            raise InputError(f"{path}: the index says that {shard} holds {name!r}, which it does not; get the model "
                             "again")


def _pickled(file: _File) -> tuple[dict[str, Spec], dict[str, _Place]]:
    """Of a torch file, without its values."""
    found = pickles.find_tensors(file.path)
    if found is None:
        raise InputError(f"{file.path} is a shard in the layout of torch before 1.6; save the model again")
    specs = {name: Spec(one.dtype, one.shape) for name, one in found.items()}
    places = {name: _Place(file, one.begin, one.end, _strides(one), one.crc) for name, one in found.items()}
    return specs, places


def _strides(stored: pickles.Stored) -> tuple[int, ...] | None:
    """None where the values lie in their order."""
    expected, size = [], 1
    for length in reversed(stored.shape):
        expected.insert(0, size)
        size *= length
    moved = any(n > 1 and s != e for n, s, e in zip(stored.shape, stored.strides, expected))
    return stored.strides if moved or 0 in stored.shape else None


def _header(file: _File) -> tuple[dict[str, Spec], dict[str, _Place]]:
    """Of a safetensors file; every claim checked against the file's size and the others."""

    def broken(why: str) -> InputError:
        return InputError(f"{file.path} is not a whole safetensors file ({why}); get it again")

    if file.size < 8:
        raise broken("it is shorter than a header")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > min(_LONGEST_HEADER, file.size - 8):
        raise broken(f"its header would have {length} bytes, the file has {file.size}")
    try:
        pairs = json.loads(file.read(8, 8 + length).tobytes(), object_pairs_hook=_no_key_twice)
        if not isinstance(pairs, dict):
            raise ValueError("its header is not a mapping")
        entries = {name: _entry(name, said) for name, said in pairs.items() if name != "__metadata__"}
    except (ValueError, RecursionError) as error:
        raise broken(str(error)) from error
    position, start = 0, 8 + length
    for name, (_, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][1]):
        if begin != position:
            raise broken(f"the bytes of {name!r} {'overlap others' if begin < position else 'leave a gap'}")
        position = end
    if position != file.size - start:
        raise broken(f"its tensors take {position} bytes, the file holds {file.size - start}")
    specs = {name: spec for name, (spec, _) in entries.items()}
    return specs, {name: _Place(file, start + begin, start + end) for name, (_, (begin, end)) in entries.items()}


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twice!r} twice")
    return seen


def _entry(name: str, said: Any) -> tuple[Spec, tuple[int, int]]:
    try:
        word, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its header does not describe {name!r}") from error
    if word not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {word!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{name!r} has a shape or place that is no list of whole numbers")
    spec = Spec(DTYPES[word], tuple(shape))
    if end - begin != spec.nbytes:
        raise ValueError(f"{name!r} of shape {shape} and dtype {word} cannot have {end - begin} bytes")
    return spec, (begin, end)


class SafetensorsWriter:
    """One safetensors file whose header is written first and whose tensors follow in any order.

    Data is handed to the disk as it comes, so that the final sync has little left to do.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.path, self._offsets, position = path, {}, 0
        for name, spec in specs.items():
            end = position + spec.nbytes
            header[name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
            self._offsets[name] = position
            position = end
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._specs, self._start, self._left, self._unsynced = dict(specs), 8 + len(text), set(specs), 0
        self._handle = open(path, "wb", buffering=0)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """One tensor of the header, of its dtype and shape."""
        spec = self._specs[name]
        if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
            raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced was {spec.dtype}{spec.shape}")
        self._put(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), self._start + self._offsets[name])
        self._left.remove(name)

    def _put(self, data: Any, position: int) -> None:
        rest = memoryview(data)
        self._unsynced += len(rest)
        while rest:
            put = os.pwrite(self._handle.fileno(), rest, position)
            rest, position = rest[put:], position + put
        if self._unsynced > _BLOCK * 8:
            os.fdatasync(self._handle.fileno())
            self._unsynced = 0

    def close(self) -> None:
        """Closes the file; an error if a tensor that was announced is missing."""
        self._handle.close()
        if self._left:
            raise ValueError(f"{self.path}: {sorted(self._left)[0]} was announced and not written")

    def abandon(self) -> None:
        """Closes a file that will not be finished."""
        self._handle.close()


class ShardedWriter:
    """The tensors of a model in one or several safetensors files of a folder, with an index where there are several.

    Args:
        folder: exists.
        shards: `{file name: {tensor name: spec}}`.
        metadata: of every file.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Mapping[str, Spec]], metadata: Mapping[str, str]):
        self._folder, self._shards = folder, shards
        self._writers = {file: SafetensorsWriter(folder / file, specs, metadata) for file, specs in shards.items()}
        self._where = {name: file for file, specs in shards.items() for name in specs}

    def write(self, name: str, tensor: np.ndarray) -> None:
        """One tensor."""
        self._writers[self._where[name]].write(name, tensor)

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for writer in self._writers.values():
            writer.close() if kind is None else writer.abandon()
        if kind is None and len(self._shards) > 1:
            size = sum(spec.nbytes for specs in self._shards.values() for spec in specs.values())
            index = {"metadata": {"total_size": size}, "weight_map": self._where}
            files.write_json(self._folder / folders.INDEX, index)


def sharded(specs: Mapping[str, Spec], limit: int, stem: str = "model") -> dict[str, dict[str, Spec]]:
    """Files of at most `limit` bytes (or one tensor), named as Hugging Face names them, in the order of `specs`."""
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + spec.nbytes > limit:
            shards.append({})
        shards[-1][name] = spec
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def sizes(specs: Iterable[Spec]) -> int:
    """Bytes of all."""
    return sum(spec.nbytes for spec in specs)
