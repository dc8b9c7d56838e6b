"""Reads torch `.pth` files (state dicts) as NumPy arrays without torch and without running anything a pickle names.

Both layouts of `torch.save` are read: the zip archive (`data.pkl` and `data/<key>` files) and the older stream of
pickles followed by the storages. The unpickler knows tensors, storages and OrderedDict; any other global is refused
before it is looked up, so nothing can be imported or called.
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
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

    def numpy(self) -> np.ndarray:
        size = self.storage.array.size
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1
        if min((self.offset, *self.shape, *self.strides)) < 0 or len(self.shape) != len(self.strides):
            raise ValueError("a tensor has a negative size or too few strides")
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        if reach > size or math.prod(self.shape) > size:
            raise ValueError("a tensor reaches outside its storage")
        item = self.storage.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            self.storage.array[self.offset :], self.shape, [s * item for s in self.strides], writeable=False
        )
        return view.copy()


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        tree = _read_zip(data, path) if data[:4] == b"PK\x03\x04" else _read_legacy(data, path)
        return dict(_flatten(tree, ""))
    except InputError:
        raise
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a whole torch state dict ({reason}); get it again") from error


def _flatten(tree, prefix: str):
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix or 'the top level'} is a {type(tree).__name__}, not a tensor or a dictionary")
    for name, value in tree.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value.numpy()
        else:
            yield from _flatten(value, f"{prefix}{name}.")


def _read_zip(data: bytes, path: Path):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        big = f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") == b"big"
        unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), path)
        tree = unpickler.load()
        for key, storage in unpickler.storages.items():
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
    if len(raw) != storage.count * storage.dtype.itemsize:
        raise ValueError(f"a storage has {len(raw)} bytes instead of {storage.count} elements of {storage.dtype}")
    array = np.frombuffer(raw, storage.dtype)
    return array if little == (sys.byteorder == "little") else array.byteswap()
