"""Whole models, language models and vision towers as Orbax checkpoints, read and written a few tensors at a time.

A checkpoint is an Orbax v1 pytree of NumPy arrays named by our paths, layers apart (`language/layers/3/q/kernel`), with
custom metadata `{"format": 1, "kind": "model", "family": ..., "config": config.json, "crc32": of each, ...}`. Small
files of the model (tokenizer, image processor, templates) lie in its folder `files`.
"""

import contextlib
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from pivotjax.checkpoints import store
from pivotjax.checkpoints.tensors import Checkpoint, Spec
from pivotjax.errors import InputError

FORMAT, FILES = 1, "files"
_READ, _WRITTEN = 128_000_000, 128_000_000  # bytes that are read, written at once
_KEPT = 2  # groups of tensors that were read and not all asked for


def is_model(path: Path | epath.Path) -> bool:
    """Whether a folder is an Orbax checkpoint of a model, as its metadata says it; nothing else is read."""
    return store.custom_metadata(path).get("kind") == "model"


class OrbaxModel(Checkpoint):
    """The tensors of such a checkpoint by our paths; a neighbour of one that was read is in memory already.

    Fields:
        info: the custom metadata.
        settings: config.json of the model, as transformers has it.
        folder: of the small files.
    """

    def __init__(self, path: Path | epath.Path):
        self.path, self.folder = path, path / FILES
        if isinstance(path, Path):
            _check_links(path)
            if not store.complete(path):
                raise store.damaged(path)
        try:
            metadata = ocp.metadata(_absolute(path))
            flat, _ = jax.tree.flatten_with_path(metadata.metadata, is_leaf=lambda node: hasattr(node, "shape"))
            self._parts = {"/".join(part.key for part in keys): tuple(part.key for part in keys) for keys, _ in flat}
            self.specs = {name: Spec(np.dtype(leaf.dtype), leaf.shape) for name, (_, leaf) in zip(self._parts, flat)}
            self.info, self.settings = metadata.custom_metadata, metadata.custom_metadata["config"]
            self._crc32 = dict(self.info["crc32"])
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise store.damaged(path) from error
        # Layers of one leaf lie together: they are read together where they are stacked.
        order = sorted(self.specs, key=lambda name: ([p for p in name.split("/") if not p.isdigit()], _numbers(name)))
        self._groups = _grouped(order, self.specs, _READ)
        self._place = {name: (i, j) for i, group in enumerate(self._groups) for j, name in enumerate(group)}
        self._ready: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> np.ndarray:
        number, _ = self._place[name]
        with self._lock:
            if name not in self._ready.get(number, {}):
                self._ready[number] = self._load(self._groups[number])
                while len(self._ready) > _KEPT:
                    del self._ready[next(iter(self._ready))]
            found = self._ready[number].pop(name)
            if not self._ready[number]:
                del self._ready[number]
        return found

    def _load(self, names: list[str]) -> dict[str, np.ndarray]:
        wanted: dict[str, Any] = {}
        for name in names:
            *above, last = self._parts[name]
            _below(wanted, above)[last] = np.broadcast_to(np.zeros((), self.specs[name].dtype), self.specs[name].shape)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                loaded = ocp.load(_absolute(self.path), wanted)
        except Exception as error:
            raise store.damaged(self.path) from error
        found = {name: _below(loaded, self._parts[name][:-1])[self._parts[name][-1]] for name in names}
        for name, tensor in found.items():
            if _crc32(tensor) != self._crc32.get(name):
                raise InputError(f"{self.path}: the bytes of {name} are damaged (CRC-32); save or copy it again")
        return found

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        return {self.path.name: tuple(self._place)}

    def position(self, name: str) -> tuple[int, int]:
        return self._place[name]

    def digests(self) -> dict[str, str]:
        """None: Orbax spreads a checkpoint over files as it likes."""
        return {}

    def close(self) -> None:
        self._ready.clear()


def _crc32(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _check_links(path: Path) -> None:
    home = path.resolve()
    for file in path.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(home):
            raise InputError(f"{file} is a link out of its folder; copy the file itself there if it is meant")


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split("/") if part.isdigit()]


def _grouped(names: list[str], specs: Mapping[str, Spec], size: int) -> list[list[str]]:
    groups, held = [[]], 0
    for name in names:
        if groups[-1] and held + specs[name].nbytes > size:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += specs[name].nbytes
    return groups


def _below(tree: dict[str, Any], keys: Any) -> dict[str, Any]:
    for key in keys:
        tree = tree.setdefault(key, {})
    return tree


def _absolute(path: Path | epath.Path) -> Path | epath.Path:
    return path.absolute() if isinstance(path, Path) else path


class OrbaxWriter:
    """Takes tensors by our paths and writes them as such a checkpoint, some hundred megabytes at a time.

    Args:
        path: what the checkpoint will be; nothing is there before all is written.
        info: custom metadata (JSON): "family", "config", and what else should be known of the model.
        where: names the checkpoint in errors.
    """

    def __init__(self, path: Path | epath.Path, info: Mapping[str, Any], where: Path | epath.Path):
        self._path, self._info = _absolute(path), {"format": FORMAT, "kind": "model"} | dict(info)
        self._where = where
        self._tree: dict[str, Any] = {}
        self._crc32: dict[str, int] = {}
        self._held, self._saving = 0, None

    def write(self, name: str, tensor: np.ndarray) -> None:
        """One tensor, which must not be changed any more."""
        *above, last = name.split("/")
        _below(self._tree, above)[last] = tensor
        self._crc32[name] = _crc32(tensor)
        self._held += tensor.nbytes
        if self._held >= _WRITTEN:
            self._save()

    def _save(self) -> None:
        """Begins to write what is held, when what was held before has been written."""
        self._wait()
        context = ocp.Context()
        saving = context.array.saving
        saving.use_compression = False  # trained weights hardly shrink
        saving.enable_post_merge_validation = False
        context.memory.deepcopy_host_arrays = False
        with store.disk_errors(self._where), context:
            about = self._info | {"crc32": self._crc32}  # Orbax joins those of all parts
            self._saving = ocp.partial.save_async(self._path, self._tree, custom_metadata=about)
        self._tree, self._crc32, self._held = {}, {}, 0

    def _wait(self) -> None:
        if self._saving is not None:
            with store.disk_errors(self._where):
                self._saving.result()

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            if self._saving is not None:
                with contextlib.suppress(Exception):  # what went wrong first is told
                    self._saving.result()  # it must not write on while its folder is removed
            return
        if self._tree:
            self._save()
        self._wait()
        with store.disk_errors(self._where):
            ocp.partial.finalize(self._path)


def open_model(path: Path | epath.Path) -> OrbaxModel:
    """Opens a checkpoint that `is_model`; InputError if it is not whole."""
    found = OrbaxModel(path)
    if not isinstance(found.settings, dict) or found.info.get("format") != FORMAT:
        raise InputError(f"{path} is a model of format {found.info.get('format')!r}; this pivotjax reads {FORMAT}")
    return found
