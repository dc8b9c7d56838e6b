"""Torch's `.bin` and `.pth` files (state dicts) as NumPy arrays, without torch and without running what a pickle names.

Both layouts of `torch.save` are read: the zip archive (`data.pkl` and `data/<key>` members, stored as they are, so that
a tensor's bytes can be found in the file) and the older stream of pickles followed by the storages. The unpickler knows
tensors, storages and OrderedDict; any other global is refused before it is looked up, so nothing can be imported or
called. The archive is also written.
"""

import contextlib
import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pivotjax import files
from pivotjax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name
_ALIGNMENT = 64  # of a storage in an archive, as torch aligns it
_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Whatever a malformed pickle or archive makes the standard library raise; never an exception of ours.
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError,
    struct.error, OverflowError, MemoryError, UnicodeDecodeError, RecursionError, NotImplementedError,
)  # fmt: skip


class _StorageType(NamedTuple):
    """Stands for `torch.FloatStorage` and its kin in a pickle; cannot be called."""

    dtype: np.dtype


class Stored(NamedTuple):
    """Where a tensor lies in a file: `strides` (in elements) over the bytes `[begin, end)`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    end: int
    crc: int | None  # of these bytes, where the archive knows it


class _Storage:
    """A flat array that is known now and filled when its bytes have been found."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count, self.array = dtype, count, None


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def reach(self) -> int:
        """The end of what it covers of its storage; ValueError if that is not inside."""
        if min((self.offset, *self.shape, *self.strides)) < 0 or len(self.shape) != len(self.strides):
            raise ValueError("a tensor has a negative size or too few strides")
        if 0 in self.shape:
            return self.offset
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1
        if reach > self.storage.count or math.prod(self.shape) > self.storage.count:
            raise ValueError("a tensor reaches outside its storage")
        return reach

    def numpy(self) -> np.ndarray:
        reach = self.reach()
        return strided(self.storage.array[self.offset : reach], self.shape, self.strides).copy()


def strided(flat: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """A view of a flat array; `strides` in elements."""
    if 0 in shape:
        return np.zeros(shape, flat.dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides], writeable=False)


def _rebuild_tensor(storage, offset, shape, strides, *_rest) -> _Tensor:
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in (offset, *shape, *strides)):
        raise ValueError("a tensor is not described by a storage, an offset, a shape and strides")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_rest) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter does not hold a tensor")
    return tensor


_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Refuses every global outside `_GLOBALS`; collects the storages that tensors refer to in `storages`."""

    def __init__(self, file, path: Path):
        super().__init__(file)
        self.path, self.storages = path, {}

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise InputError(
                f"{self.path} refused: its pickle names {module}.{name}, which could run code; "
                "save a plain state_dict, or safetensors"
            ) from None

    def persistent_load(self, pid):
        tag, kind, key, _device, count, *view = pid
        if tag != "storage" or not isinstance(kind, _StorageType) or type(count) is not int or any(view):
            raise ValueError("an unknown kind of storage reference")
        return self.storages.setdefault(str(key), _Storage(kind.dtype, count))


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth` state dict, by name; nested dictionaries are joined with dots.

    InputError if the file is missing, truncated, or its pickle names anything but tensors, storages and OrderedDict.
    """
    path = Path(path)
    with _damage(path):
        data = path.read_bytes()
        tree = _read_zip(data, path) if data[:4] == b"PK\x03\x04" else _read_legacy(data, path)
        return {name: tensor.numpy() for name, tensor in _flat(tree).items()}


def find_tensors(path: Path) -> dict[str, Stored] | None:
    """Where the tensors of a `.bin` file lie, by name; None for the older layout and for big-endian files.

    InputError as for `read_state_dict`.
    """
    with _damage(path), open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
        with zipfile.ZipFile(file) as archive:
            root, big, tree, storages = _open_zip(archive, path)
            if big:
                return None
            members = {key: archive.getinfo(f"{root}data/{key}") for key in storages}
            starts = {key: _start(file, member) for key, member in members.items()}
        _check_disjoint(starts, members, path.stat().st_size)
        for key, storage in storages.items():
            if members[key].compress_type != zipfile.ZIP_STORED:
                raise ValueError("its members are compressed, as torch.save never does it")
            storage.array = key  # its place, instead of its values
            _check_size(members[key].file_size, storage)
        return {name: _stored(tensor, starts, members) for name, tensor in _flat(tree).items()}


def _stored(tensor: _Tensor, starts: Mapping[str, int], members: Mapping[str, zipfile.ZipInfo]) -> Stored:
    key, item = tensor.storage.array, tensor.storage.dtype.itemsize
    begin, end = tensor.offset * item, tensor.reach() * item
    crc = members[key].CRC if end - begin == members[key].file_size else None
    return Stored(tensor.storage.dtype, tensor.shape, tensor.strides, starts[key] + begin, starts[key] + end, crc)


def _start(file: io.BufferedIOBase, member: zipfile.ZipInfo) -> int:
    """The first byte of a member's data; names and extra fields of its own header may differ from the directory's."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    signature, name, extra = struct.unpack("<4s22xHH", header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"{member.filename} does not begin where its directory says")
    return member.header_offset + _LOCAL_HEADER + name + extra


def _check_disjoint(starts: Mapping[str, int], members: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    position = 0
    for key in sorted(starts, key=starts.get):
        if starts[key] < position or starts[key] + members[key].file_size > size:
            raise ValueError(f"the bytes of {members[key].filename} overlap others or end outside the file")
        position = starts[key] + members[key].file_size


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What a broken file makes the standard library raise, as one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a whole torch state dict ({reason}); get it again") from error


def _flat(tree) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    for name, tensor in _flatten(tree, ""):
        if name in found:
            raise ValueError(f"it holds {name!r} twice")
        found[name] = tensor
    return found


def _flatten(tree, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix or 'the top level'} is a {type(tree).__name__}, not a tensor or a dictionary")
    for name, value in tree.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _flatten(value, f"{prefix}{name}.")


def _open_zip(archive: zipfile.ZipFile, path: Path):
    """The folder's name in an archive, whether numbers are big-endian, the pickled tree, its storages."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    big = f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") == b"big"
    unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), path)
    return root, big, unpickler.load(), unpickler.storages


def _read_zip(data: bytes, path: Path):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root, big, tree, storages = _open_zip(archive, path)
        for key, storage in storages.items():
            storage.array = _array(archive.read(f"{root}data/{key}"), storage, little=not big)
    return tree


def _read_legacy(data: bytes, path: Path):
    file = io.BytesIO(data)
    if _Unpickler(file, path).load() != _LEGACY_MAGIC or _Unpickler(file, path).load() != _LEGACY_PROTOCOL:
        raise ValueError("it does not start as torch.save starts a file")
    little = _Unpickler(file, path).load()["little_endian"]
    unpickler = _Unpickler(file, path)
    tree = unpickler.load()
    for key in _Unpickler(file, path).load():
        storage = unpickler.storages[key]
        (count,) = struct.unpack("<q" if little else ">q", file.read(8))
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} elements where its tensors say {storage.count}")
        storage.array = _array(file.read(count * storage.dtype.itemsize), storage, little)
    return tree


def _array(raw: bytes, storage: _Storage, little: bool) -> np.ndarray:
    _check_size(len(raw), storage)
    array = np.frombuffer(raw, storage.dtype)
    return array if little == (sys.byteorder == "little") else array.byteswap()


def _check_size(size: int, storage: _Storage) -> None:
    if size != storage.count * storage.dtype.itemsize:
        raise ValueError(f"a storage has {size} bytes instead of {storage.count} elements of {storage.dtype}")


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a dictionary of tensors as `torch.save` does, atomically; `torch.load(path, weights_only=True)` reads it.

    ValueError for a dtype that torch's storages do not have.
    """
    held = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    root = path.stem
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _put(archive, f"{root}/data.pkl", _pickled(held))
        _put(archive, f"{root}/byteorder", b"little")
        for key, tensor in enumerate(held.values()):
            _put(archive, f"{root}/data/{key}", tensor.tobytes())
        _put(archive, f"{root}/version", b"3\n")


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """One member, its data aligned by an extra field as torch writes it ("FB"), its date always the same."""
    member = zipfile.ZipInfo(name)
    before = archive.fp.tell() + _LOCAL_HEADER + len(name) + 4
    room = -before % _ALIGNMENT
    member.extra = b"FB" + struct.pack("<H", room) + b"Z" * room
    archive.writestr(member, data)


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A pickle (protocol 2) of `{name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, {})}`, put
    together from its opcodes because pickling a name needs the thing that it names."""
    kinds = {dtype: name for name, dtype in _DTYPES.items()}

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()

    def whole(value: int) -> bytes:
        return pickle.LONG1 + bytes([8]) + struct.pack("<q", value)

    def several(*parts: bytes) -> bytes:
        return pickle.MARK + b"".join(parts) + pickle.TUPLE

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    out = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        if tensor.dtype not in kinds:
            raise ValueError(f"{name} is {tensor.dtype}, which torch's storages do not have")
        storage = several(text("storage"), named("torch", kinds[tensor.dtype]), text(str(key)), text("cpu"),
                          whole(tensor.size)) + pickle.BINPERSID  # fmt: skip
        strides = [stride // tensor.itemsize for stride in tensor.strides]
        empty = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        view = several(storage, whole(0), several(*map(whole, tensor.shape)), several(*map(whole, strides)),
                       pickle.NEWFALSE, empty)  # fmt: skip
        out += [text(name), named("torch._utils", "_rebuild_tensor_v2"), view, pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])
