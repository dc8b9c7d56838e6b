"""Where arrays live: a mesh of `expert, data, fsdp, tensor`, and one table from array names to PartitionSpecs."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pivotjax.config import check_least
from pivotjax.data.pipeline import Share
from pivotjax.errors import InputError
from pivotjax.progress import say

AXES = ("expert", "data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what an expert's batch is spread over

# First match wins; names are the pytree's path, joined by "/". Frozen weights are cut along `fsdp` to be held and
# gathered a layer at a time; along `tensor` they stay cut: columns of what widens, rows of what narrows.
RULES: tuple[tuple[str, P], ...] = (
    (r"batch/.*", P("expert", ROWS)),
    (r"state/(params|opt_state|alive|loss_average)(/.*)?", P("expert")),
    (r"frozen/\w+/layers/(q|k|v|qkv|gate|up|gate_up|fc1)/kernel", P(None, "fsdp", "tensor")),
    (r"frozen/\w+/layers/(q|k|v|qkv|gate|up|gate_up|fc1)/bias", P(None, "tensor")),
    (r"frozen/\w+/layers/(o|down|fc2)/kernel", P(None, "tensor", "fsdp")),
    (r"frozen/language/embedding", P("tensor", "fsdp")),
    (r"frozen/language/head/kernel", P("fsdp", "tensor")),
    (r".*", P()),  # norms, the step counter, metrics: one copy a device
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product must be the number of devices (1 x 1 x 1 x 1: the first device)."""

    expert: int = 1
    """Devices over which the experts are spread (0: all that the other axes leave; so too below, for one axis)."""
    data: int = 0
    """Devices over which each expert's batch is spread (by default all that the other axes leave)."""
    fsdp: int = 1
    """Devices over which each expert's batch and the frozen weights are spread."""
    tensor: int = 1
    """Devices over which each product with a frozen matrix is spread."""

    def __post_init__(self):
        check_least(self, expert=0, data=0, fsdp=0, tensor=0)
        if astuple(self).count(0) > 1:
            raise InputError(
                f"of expert, data, fsdp and tensor one may be 0, not {astuple(self).count(0)}; set mesh.data, 0 by "
                "default"
            )


def make_mesh(config: MeshConfig, experts: int, rows: int, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """The mesh, over all devices if none are given.

    InputError where it does not fit them, or experts and rows, or leaves a process without a device.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _sizes(config, len(devices))
    expert, data, fsdp, _ = shape
    for count, name, size in (
        (experts, "experts", expert),
        (rows, "samples of an expert", data * fsdp),
    ):
        if count % size:
            raise InputError(
                f"{count} {name} cannot be spread evenly over {size} devices (mesh {_said(shape)}); change the mesh or "
                "the batch"
            )
    chosen = devices[: math.prod(shape)]
    if len(chosen) < len(devices):
        if len({device.process_index for device in devices}) > 1:
            raise InputError(f"mesh {_said(shape)} leaves processes without a device; set mesh.data to 0: all devices")
        say(f"{len(chosen)} of {len(devices)} devices is used; mesh.data: 0 takes all")
    return Mesh(_placed(shape, chosen), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape, along a TPU's links; `jax.make_mesh` would split a torus's axis on v5e only."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError) as error:  # by what of the torus does not suit
        line = str(error).partition("\n")[0]
        raise InputError(f"mesh {_said(shape)} cannot be laid over these devices ({line}); change the mesh") from error


def _said(shape: tuple[int, ...]) -> str:
    return f"{' x '.join(map(str, shape))} ({', '.join(AXES)})"


def _sizes(config: MeshConfig, there: int) -> tuple[int, ...]:
    sizes = astuple(config)
    given = math.prod(size for size in sizes if size)
    if 0 in sizes:
        sizes = tuple(size or max(1, there // given) for size in sizes)
    need = math.prod(sizes)
    if need > there or (need != 1 and need != there):
        raise InputError(f"mesh {_said(sizes)} needs {need} devices, {there} are there; set mesh.data or another")
    return sizes


def shardings(mesh: Mesh, root: str, tree: Any) -> Any:
    """A NamedSharding for every leaf of `tree`, whose names start with `root`; leaves may be shapes only.

    An axis that does not divide a leaf's size is left out for that leaf.
    """

    def of(path, leaf):
        name = "/".join([root, *(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)])
        spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
        return fitting(mesh, spec, np.shape(leaf))

    return jax.tree_util.tree_map_with_path(of, tree)


def fitting(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """The spec without axes that have one device, or do not divide the size: as the compiler writes it, too."""
    kept = []
    for size, axes in zip(shape, spec):
        axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
        fits = axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0
        kept.append((axes[0] if len(axes) == 1 else axes) if fits else None)
    while kept and kept[-1] is None:
        kept.pop()
    return NamedSharding(mesh, P(*kept))


def put(tree: Any, where: Any) -> Any:
    """Every process's whole copy of `tree` -> global arrays in the given shardings."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, where)


def local_share(mesh: Mesh, experts: int, rows: int) -> Share:
    """What this process feeds of a batch `[experts, rows, ...]`; InputError where that is no block of it.

    An expert's rows are all alike, so a process whose devices hold rows that do not lie side by side feeds as many that
    do: `Layout.put_batch` puts them where its devices are.
    """
    where = NamedSharding(mesh, P("expert", ROWS)).devices_indices_map((experts, rows))
    held: dict[int, set[tuple[int, int]]] = {}
    for device, part in where.items():
        first = tuple(cut.indices(size)[0] for cut, size in zip(part, (experts, rows)))
        held.setdefault(device.process_index, set()).add(first)
    each = experts // mesh.shape["expert"], rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    return _share(held, jax.process_index(), each)


def _share(held: Mapping[int, set[tuple[int, int]]], own: int, each: tuple[int, int]) -> Share:
    """The share of process `own`; `held`: where each process's parts begin (expert, row); `each`: how large one is."""
    groups = {process: tuple(sorted({row for _, row in parts})) for process, parts in held.items()}
    ordered = sorted(set(groups.values()))
    experts = sorted({expert for expert, _ in held[own]})
    apart = sum(map(len, ordered)) == len(set().union(*ordered)) and len(set(map(len, ordered))) == 1
    aside = experts == list(range(experts[0], experts[-1] + 1, each[0]))
    if not (apart and aside and len(held[own]) == len(experts) * len(groups[own])):
        raise InputError(
            "on this mesh the batches that the hosts feed overlap in part; change mesh.expert, mesh.data or mesh.fsdp "
            "so that each is a multiple or a divisor of a host's devices"
        )
    count, place = len(groups[own]) * each[1], ordered.index(groups[own])
    return Share(range(experts[0], experts[-1] + each[0]), range(place * count, (place + 1) * count))


@dataclass(frozen=True)
class Layout:
    """Where a training step's arrays live and how it is compiled: `jit` on a mesh, or `pmap` over the mesh's devices.

    Either way arrays keep their natural shapes (no leading axis of devices), and the numbers are the same.
    """

    parallel: Literal["jit", "pmap"]
    mesh: Mesh

    @property
    def axis(self) -> str | None:
        """The mapped axis over which gradients and counts are summed by hand; under `jit` there is none."""
        return "data" if self.parallel == "pmap" else None

    @property
    def platform(self) -> str:
        """Of the devices: cpu, gpu, tpu."""
        return self.mesh.devices.flat[0].platform

    def put_state(self, state: Any) -> Any:
        """Train state onto its devices."""
        return put(state, shardings(self.mesh, "state", state))

    def put_frozen(self, frozen: Any) -> Any:
        """Frozen weights onto their devices; those that are there already are not copied."""
        return put(frozen, shardings(self.mesh, "frozen", frozen))

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part of a batch `[K, B, ...]` onto its devices."""
        if self.parallel == "jit":
            where = NamedSharding(self.mesh, P("expert", ROWS))  # not `shardings`: sizes here are this process's
            return {name: jax.make_array_from_process_local_data(where, a) for name, a in batch.items()}
        count = self.mesh.size
        parts = {name: np.stack(np.split(a, count, axis=1)) for name, a in batch.items()}
        return jax.device_put(parts, NamedSharding(self.mesh, P("data")))

    def compile(self, step: Callable) -> Callable:
        """`step(state, frozen, batch) -> (state, metrics)`; the state that goes in is used up."""
        return self._compiled(step, donate_argnums=(0,))

    def compile_evaluation(self, evaluate: Callable) -> Callable:
        """`evaluate(params, frozen, batch)`; nothing is used up."""
        return self._compiled(evaluate, donate_argnums=())

    def _compiled(self, function: Callable, donate_argnums: tuple[int, ...]) -> Callable:
        if self.parallel == "jit":
            return jax.jit(function, donate_argnums=donate_argnums)
        devices = list(self.mesh.devices.flat)
        mapped = dict(axis_name=self.axis, in_axes=(None, None, 0), out_axes=None, devices=devices)
        return jax.pmap(function, donate_argnums=donate_argnums, **mapped)


def layout(parallel: Literal["jit", "pmap"], mesh: Mesh) -> Layout:
    """The layout; InputError where `pmap` is asked for more than one host's data parallelism."""
    if parallel == "pmap" and (jax.process_count() > 1 or mesh.shape["data"] != mesh.size):
        raise InputError(
            "parallel: pmap spreads the batch over one host's devices (mesh.data) and nothing else; for the mesh "
            f"{' x '.join(map(str, mesh.shape.values()))} on {jax.process_count()} hosts set parallel: jit"
        )
    return Layout(parallel, mesh)
