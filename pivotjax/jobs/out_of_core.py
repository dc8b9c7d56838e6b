"""Merging of models that do not fit in memory: tensor by tensor (or layer by layer), from disk to disk.

Each checkpoint has a thread that reads (and hashes) it, ahead of the merging; one thread measures the updates while
XLA merges; one writes. What is in memory at any moment (tensors read ahead, the merge's own memory as XLA states it,
results not yet written) is held below a budget. One program is compiled for each kind of unit: names are replaced by
common ones, so that all blocks of a model share it. Methods that draw random numbers see the real names, which their
draws depend on, and pay for it with a program each.
"""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.checkpoints.tensors import Checkpoint, Spec, sizes
from pivotjax.errors import InputError
from pivotjax.merging import diagnostics, merge, settings
from pivotjax.merging.registry import Method
from pivotjax.merging.updates import finite, layout_of
from pivotjax.progress import Bar

Base = Literal["none", "file", "mean", "zero"]
_BLOCK = 1 << 16  # entries that are measured at once: they stay in a core's cache
_STEM = "tensor"  # stands for the names of all layers


class Sink(Protocol):
    """Takes merged tensors, in any order, from one thread."""

    def write(self, name: str, tensor: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a merge.

    Fields:
        experts: by name.
        base: the checkpoint that updates are measured from, if `measured_from` is `file`.
        measured_from: `file`, the experts' `mean`, `zero`, or `none`.
        donor: whose names and order the result takes: the base, else the first expert.
    """

    experts: Mapping[str, Checkpoint]
    base: Checkpoint | None
    measured_from: Base
    donor: Checkpoint

    @property
    def named(self) -> dict[str, Checkpoint]:
        """All of them, the base first."""
        return ({"the base": self.base} if self.base is not None else {}) | dict(self.experts)


class Merging(NamedTuple):
    """How: the method, its options (settings allowed), the dtype of the result (None: the donor's)."""

    method: Method
    options: Mapping[str, Any]
    dtype: np.dtype | None


class Unit(NamedTuple):
    """Tensors that are merged together, and the plain options for them. None: copied from the donor."""

    names: tuple[str, ...]
    options: Mapping[str, Any] | None


@dataclass
class Found:
    """What a merge reports, tensor by tensor."""

    layers: dict[str, dict] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    products: dict[str, np.ndarray] = field(default_factory=dict)  # inner products of the updates, a tensor


def specs_of_result(inputs: Inputs, dtype: np.dtype | None) -> dict[str, Spec]:
    """Names, shapes and dtypes of the result, in the order of the donor's bytes."""
    ordered = sorted(inputs.donor.specs, key=inputs.donor.position)
    return {name: _result(inputs.donor.specs[name], dtype) for name in ordered}


def _result(spec: Spec, dtype: np.dtype | None) -> Spec:
    return spec._replace(dtype=dtype) if dtype is not None and _is_float(spec) else spec


def _is_float(spec: Spec) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.floating)


def in_units(inputs: Inputs, merging: Merging, copied: Iterable[str]) -> list[Unit]:
    """What is merged together, in the order of the donor's bytes; `copied` and what holds no floats is copied."""
    specs = {name: spec for name, spec in inputs.donor.specs.items() if name not in set(copied)}
    merged = [name for name, spec in specs.items() if _is_float(spec) and spec.nbytes]
    groups = [(name,) for name in merged] if merging.method.scope == "tensor" else _layers(specs, merged)
    depths = settings.relative_depths(list(inputs.donor.specs))
    units = [Unit(names, settings.plain(merging.options, names[0], depths[names[0]])) for names in groups]
    units += [Unit((name,), None) for name in inputs.donor.specs if name not in set(merged)]
    return sorted(units, key=lambda unit: min(map(inputs.donor.position, unit.names)))


def _layers(specs: Mapping[str, Spec], names: Sequence[str]) -> list[tuple[str, ...]]:
    """A weight with its bias; other tensors alone. The weight comes first."""
    layout = layout_of({name: jax.ShapeDtypeStruct(specs[name].shape, specs[name].dtype) for name in names})
    both = [(layout.paths[layer.weight], *([layout.paths[layer.bias]] if layer.bias is not None else []))
            for layer in layout.layers]
    return both + [(layout.paths[i],) for i in layout.others]


def stream(inputs: Inputs, merging: Merging, units: Sequence[Unit], sink: Sink, budget: int) -> Found:
    """Merges every unit into the sink.

    Args:
        inputs: open checkpoints.
        merging: how.
        units: from `in_units`.
        sink: is written to from one thread.
        budget: bytes that reading ahead, merging and writing may hold together; one unit always runs.

    Raises:
        InputError: a tensor that is not finite, integers that differ, a result that overflows its dtype.
    """
    run = _Run(inputs, merging, sink, budget)
    total = sum(sizes(inputs.donor.specs[name] for name in unit.names) for unit in units)
    with run, Bar(_megabytes(total), "merge", unit="MB") as bar:
        done = 0
        for unit in run.merged(units):
            before = _megabytes(done)
            done += sizes(inputs.donor.specs[name] for name in unit.names)
            bar.update(_megabytes(done) - before)
    return run.found


def _megabytes(size: int) -> int:
    return round(size / 1e6)


class _Read(NamedTuple):
    """A unit on its way from disk: the tensors of each checkpoint."""

    unit: Unit
    cost: int
    parts: dict[str, Future]


class _Run:
    """The threads of one merge. All decisions are made in the caller's thread."""

    def __init__(self, inputs: Inputs, merging: Merging, sink: Sink, budget: int):
        self.inputs, self.merging, self.sink, self.budget = inputs, merging, sink, budget
        self.found = Found()
        self._programs = _Programs(inputs, merging, self.found)
        # One thread a checkpoint, also where two experts are the same file.
        self._readers = {id(one): ThreadPoolExecutor(1, f"read {who}") for who, one in inputs.named.items()}
        self._measurer, self._writer = ThreadPoolExecutor(1, "measure"), ThreadPoolExecutor(1, "write")
        self._held = 0
        self._reading: deque[_Read] = deque()
        self._writing: deque[tuple[Future, int]] = deque()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: Any) -> None:
        for pool in (*self._readers.values(), self._measurer, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)

    def merged(self, units: Iterable[Unit]) -> Iterable[Unit]:
        """Yields each unit when it has been merged; all is written when the last one has been yielded."""
        todo = deque(units)
        while todo or self._reading:
            while todo and self._start(todo[0]):
                todo.popleft()
            if self._reading:
                yield self._finish(self._reading.popleft())
            elif self._writing:  # the next one fits when this has left memory
                self._written(self._writing.popleft())
        while self._writing:
            self._written(self._writing.popleft())

    def _start(self, unit: Unit) -> bool:
        """Begins to read a unit if there is room for it, or nothing else under way."""
        while self._writing and self._writing[0][0].done():
            self._written(self._writing.popleft())
        cost = sum(sizes(checkpoint.specs[name] for name in unit.names if name in checkpoint.specs)
                   for checkpoint in self._sources(unit).values())
        if unit.options is not None:
            cost += self._programs.of(unit).memory
        if self._held and self._held + cost > self.budget:
            return False
        self._held += cost
        parts = {who: self._readers[id(checkpoint)].submit(_read, checkpoint, unit.names)
                 for who, checkpoint in self._sources(unit).items()}
        self._reading.append(_Read(unit, cost, parts))
        return True

    def _sources(self, unit: Unit) -> dict[str, Checkpoint]:
        """What has to be read for a unit; a copied one is read where it is, to compare what cannot be merged."""
        return {who: checkpoint for who, checkpoint in self.inputs.named.items()
                if unit.options is not None or unit.names[0] in checkpoint.specs}

    def _finish(self, read: _Read) -> Unit:
        parts = {who: part.result() for who, part in read.parts.items()}
        merged = self._copy(read.unit, parts) if read.unit.options is None else self._merge(read.unit, parts)
        outputs = sum(tensor.nbytes for tensor in merged.values())
        self._held += outputs - read.cost
        self._writing.append((self._writer.submit(_write, self.sink, merged), outputs))
        return read.unit

    def _written(self, entry: tuple[Future, int]) -> None:
        future, size = entry
        future.result()
        self._held -= size

    def _merge(self, unit: Unit, parts: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        base = parts.get("the base")
        experts = [parts[name] for name in self.inputs.experts]
        measuring = self._measurer.submit(_inner_products, base, experts, self.inputs.measured_from)
        try:
            outputs, fine = self._programs.of(unit)(base, experts)
        finally:
            products = measuring.result()
        for name, inner, ok in zip(unit.names, products, fine):
            if not np.isfinite(inner).all():
                _name_the_culprit(unit, parts)
            if not ok:
                raise InputError(f"the merged tensor {name!r} overflows {outputs[0].dtype}; use a smaller scale or a "
                                 "wider dtype")
            self.found.products[name] = inner
        return dict(zip(unit.names, outputs))

    def _copy(self, unit: Unit, parts: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        (name,) = unit.names
        donor = next(who for who, checkpoint in self.inputs.named.items() if checkpoint is self.inputs.donor)
        kept = parts[donor][0]
        if not _is_float(self.inputs.donor.specs[name]):
            for who, (other,) in parts.items():
                if other.tobytes() != kept.tobytes():
                    raise InputError(f"{donor} and {who} hold different integers in {name!r}, which cannot be merged; "
                                     "merge models that are not quantised")
        return {name: kept.astype(_result(self.inputs.donor.specs[name], self.merging.dtype).dtype, copy=False)}


def _read(checkpoint: Checkpoint, names: Sequence[str]) -> list[np.ndarray]:
    read = {name: checkpoint.read(name) for name in sorted(names, key=checkpoint.position)}
    return [read[name] for name in names]


def _write(sink: Sink, tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        sink.write(name, tensor)


def _inner_products(
    base: list[np.ndarray] | None, experts: Sequence[list[np.ndarray]], measured_from: Base
) -> list[np.ndarray]:
    """`[K, K]` float64 inner products of the experts' updates, a tensor; not finite where an input is not."""
    return [_products(None if base is None else base[i], [expert[i] for expert in experts], measured_from)
            for i in range(len(experts[0]))]


def _products(base: np.ndarray | None, experts: Sequence[np.ndarray], measured_from: Base) -> np.ndarray:
    flat = [expert.reshape(-1) for expert in experts]
    origin = None if base is None else base.reshape(-1)
    total = np.zeros((len(flat), len(flat)))
    room = np.empty((len(flat), min(_BLOCK, flat[0].size)), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, flat[0].size, _BLOCK):
            block = room[:, : min(_BLOCK, flat[0].size - start)]
            for k, one in enumerate(flat):
                block[k] = one[start : start + _BLOCK]
            if origin is not None:
                block -= origin[start : start + _BLOCK].astype(np.float32)
            elif measured_from == "mean":
                block -= block.mean(0)
            total += block @ block.T
    return total


def _name_the_culprit(unit: Unit, parts: Mapping[str, list[np.ndarray]]) -> None:
    for who, tensors in parts.items():
        for name, tensor in zip(unit.names, tensors):
            if not np.isfinite(tensor.astype(np.float64 if tensor.itemsize == 8 else np.float32)).all():
                raise InputError(f"{who}: tensor {name!r} holds NaN or infinity; leave that one out or get it again")


class _Program(NamedTuple):
    """A compiled merge of one kind of unit."""

    compiled: Any
    wide: bool
    memory: int  # bytes beside the inputs
    reports: Callable[[Any], None]

    def __call__(self, base: list[np.ndarray] | None, experts: list[list[np.ndarray]]) -> tuple[list[np.ndarray], Any]:
        with _precision(self.wide):
            # The arrays are aligned and never written to again: JAX may use their memory as it is.
            placed = jax.device_put((base, experts), may_alias=True)
            outputs, fine, layers = jax.block_until_ready(self.compiled(*placed))
        self.reports(layers)
        return [np.asarray(output) for output in outputs], jax.device_get(fine)


class _Programs:
    """The compiled programs, one for each kind of unit: shapes, dtypes, options."""

    def __init__(self, inputs: Inputs, merging: Merging, found: Found):
        self._inputs, self._merging, self._found = inputs, merging, found
        self._own_names = "randomness" in merging.method.needs
        self._compiled: dict[Any, tuple[Any, bool, int, dict]] = {}

    def of(self, unit: Unit) -> _Program:
        """The program for a unit, compiled if there is none yet."""
        names = unit.names if self._own_names else tuple(_common_name(name) for name in unit.names)
        specs = tuple(tuple(_shape(c.specs[name]) for name in unit.names) for c in self._inputs.named.values())
        key = (names, specs, repr(unit.options))
        if key not in self._compiled:
            self._compiled[key] = self._compile(names, specs, unit.options)
        compiled, wide, memory, fixed = self._compiled[key]
        return _Program(compiled, wide, memory, lambda layers: self._report(unit, names, fixed, layers))

    def _compile(self, names: tuple[str, ...], specs: Sequence[Sequence[Any]], options: Mapping[str, Any]) -> tuple:
        wide = self._merging.dtype == np.float64 or any(s.dtype == np.float64 for leaves in specs for s in leaves)
        leaves = [list(checkpoint) for checkpoint in specs]
        base, experts = (leaves[0], leaves[1:]) if self._inputs.base else (None, leaves)
        fixed: dict[str, Any] = {}  # what a trace tells that is no array

        def run(base: list | None, experts: list[list]) -> tuple[list, list, dict]:
            outputs, report = self._merged(names, base, experts, options)
            arrays, fixed["words"] = diagnostics.parted(report["layers"])
            fixed["options"] = dict(report["options"])
            fixed["exceptions"] = report["exceptions"]
            return outputs, [finite(output) for output in outputs], arrays

        with _precision(wide):
            compiled = jax.jit(run).lower(base, experts).compile()
        used = compiled.memory_analysis()
        return compiled, wide, used.temp_size_in_bytes + used.output_size_in_bytes, fixed

    def _merged(self, names: tuple[str, ...], base: list | None, experts: list[list], options: Mapping[str, Any]):
        """The merge of one unit, traced: `merge` itself, in float32 or wider, then in the dtype of the result."""
        like = (base or experts[0])
        dtypes = [self._merging.dtype or leaf.dtype for leaf in like]
        sums = jnp.float64 if any(leaf.dtype == jnp.float64 for one in experts for leaf in one) else jnp.float32

        def tree(leaves: Sequence) -> dict[str, Any]:
            return {name: as_matrix(leaf) for name, leaf in zip(names, leaves)}

        if self._inputs.measured_from == "mean":
            base = [sum(one[i].astype(sums) for one in experts) / len(experts) for i in range(len(names))]
        elif self._inputs.measured_from == "zero":
            base = [jnp.zeros(leaf.shape, sums) for leaf in like]
        elif base is not None:
            base = [leaf.astype(sums) for leaf in base]
        else:  # the result has the first expert's dtype
            experts = [[leaf.astype(sums) for leaf in experts[0]], *experts[1:]]
        trees = {name: tree(one) for name, one in zip(self._inputs.experts, experts)}
        result = merge(None if base is None else tree(base), trees, self._merging.method.name, diagnose="nothing",
                       **options)
        outputs = [result.params[name].reshape(leaf.shape).astype(dtype)
                   for name, leaf, dtype in zip(names, like, dtypes)]
        return outputs, result.report

    def _report(self, unit: Unit, names: tuple[str, ...], fixed: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
        """Under the unit's real names, what the merge of this unit told."""
        real = dict(zip(names, unit.names))
        parent = re.split(r"[./](?=[^./]*$)", unit.names[0])[0]
        rename = (lambda label: label) if self._own_names else (lambda label: label.replace(_STEM, parent, 1))
        for label, facts in diagnostics.joined(jax.device_get(layers), fixed["words"]).items():
            self._found.layers[rename(label)] = facts
        self._found.options |= fixed["options"]
        self._found.exceptions |= {real.get(path, path): said for path, said in fixed["exceptions"].items()}


def as_matrix(leaf: Any) -> Any:
    """A convolution's weight `[d_out, d_in, ...]` as the matrix over patches that it is; others as they are."""
    return leaf.reshape(leaf.shape[0], -1) if leaf.ndim > 2 else leaf


def _shape(spec: Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)


def _common_name(name: str) -> str:
    return f"{_STEM}.{re.split('[./]', name)[-1]}"


def _precision(wide: bool) -> contextlib.AbstractContextManager:
    return jax.enable_x64(True) if wide else contextlib.nullcontext()
