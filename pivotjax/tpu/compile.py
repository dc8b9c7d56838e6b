"""A training step through the TPU's compiler, ahead of time: the very step and shardings of a run, on a slice's
devices, with shapes in the place of arrays."""

import pickle
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from pivotjax import files
from pivotjax.errors import InputError
from pivotjax.models import projector
from pivotjax.models.language import DecoderConfig
from pivotjax.tpu import flops
from pivotjax.tpu.flops import Work
from pivotjax.tpu.hlo import Array, Instruction, Program, parse
from pivotjax.training import parallel
from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
from pivotjax.training.step import Network, init_state, make_step

_SIZE = re.compile(r"\b([\d.]+)([KMGT])\b")  # as the compiler's complaint has what it needs, then what it may use
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Described:
    """A training step by its shapes.

    Fields:
        network: the frozen networks' graphs.
        frozen: shapes of their weights, as the step takes them.
        w0: shapes of one projector.
        decoder: sizes of the language model.
        image_flops: FLOPs of encoding one image inside the step; 0 where batches bring features.
        image: shape and type of what a batch holds of one image: pixels, or features.
        work: what a step is given.
        training: how it is trained.
    """

    network: Network
    frozen: dict[str, Any]
    w0: projector.Params
    decoder: DecoderConfig
    image_flops: float
    image: jax.ShapeDtypeStruct
    work: Work
    training: TrainingConfig

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch, as `pivotjax.data.pipeline.Batch` has them."""
        work = self.work
        rows = (work.experts, work.samples)
        made = {
            "images" if work.online else "features": jax.ShapeDtypeStruct(
                (*rows, work.images, *self.image.shape), self.image.dtype
            ),
            "tokens": jax.ShapeDtypeStruct((*rows, work.length), jnp.int32),
            "targets": jax.ShapeDtypeStruct((*rows, work.targets), jnp.int32),
            "places": jax.ShapeDtypeStruct((*rows, work.targets), jnp.int32),
            "weights": jax.ShapeDtypeStruct((*rows, work.targets), jnp.float32),
        }
        if work.images > 1:
            made |= {name: jax.ShapeDtypeStruct((*rows, work.length), jnp.int32) for name in ("segments", "positions")}
        return made

    def minimum(self) -> flops.Minimum:
        """FLOPs of a step that no arrangement goes below."""
        return flops.minimum(self.work, self.decoder, self.w0, self.image_flops)

    def arguments(self, mesh: Mesh) -> tuple[Any, Any, Any]:
        """State, frozen weights and batch as shapes in their shardings on a mesh."""
        optimizer = per_expert(adamw(self.training))
        state = jax.eval_shape(lambda w0: init_state(w0, self.work.experts, optimizer), self.w0)
        roots = ("state", state), ("frozen", self.frozen), ("batch", self.batch())
        return tuple(_placed(mesh, root, tree) for root, tree in roots)

    def without_remat(self) -> TrainingConfig:
        """The same training, with nothing computed twice on purpose."""
        return replace(self.training, remat="none")

    def traced(self, mesh: Mesh, training: TrainingConfig | None = None) -> jax.stages.Traced:
        """The step traced for a mesh, as a run traces it."""
        training = training or self.training
        layout = parallel.layout("jit", mesh)
        step = make_step(self.network, per_expert(adamw(training)), training, layout)
        return layout.compile(step).trace(*self.arguments(mesh))


def _placed(mesh: Mesh, root: str, tree: Any) -> Any:
    where = parallel.shardings(mesh, root, tree)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)


class Memory(NamedTuple):
    """Bytes of one device, by kind. Where the program does not fit, only `bytes` and `over` are known.

    Fields:
        bytes: what it needs: arguments, outputs that are not arguments too, temporaries, code.
        over: how much more that is than the compiler may use, the memory less what the runtime keeps; 0: it fits.
    """

    bytes: int
    over: int
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    code: int | None = None
    aliased: int | None = None

    @property
    def fits(self) -> bool:
        """The compiler found room for it."""
        return self.over == 0


class Backbone(NamedTuple):
    """Where the frozen weights are.

    Fields:
        bytes: of one copy.
        per_device: bytes that a device holds of them as arguments.
        shards: devices that together hold one copy.
        copies: how many copies those hold together: 1, and what small arrays add that are whole everywhere.
        repeated: arrays that the program makes in the shape of a whole stack of weights, or of a device's part of one:
            a copy inside the step, which there should not be.
    """

    bytes: int
    per_device: int
    shards: int
    copies: float
    repeated: tuple[str, ...]


class Compiled(NamedTuple):
    """What the compiler said. `program` and `executable` are None where the step does not fit."""

    memory: Memory
    seconds: float
    program: Program | None
    executable: jax.stages.Compiled | None


def compiled(step: Described, mesh: Mesh, hbm_bytes: float, flags: Mapping[str, bool]) -> Compiled:
    """Compiles a step for the devices of a mesh, with flags of their compiler.

    InputError where the step needs more than there is of something else than the chips' HBM.
    """
    started = time.monotonic()
    lowered = step.traced(mesh).lower()
    try:
        executable, text = _with_text(lowered, flags, on_tpu=mesh.devices.flat[0].platform == "tpu")
    except jax.errors.JaxRuntimeError as error:
        return Compiled(_too_large(error), time.monotonic() - started, None, None)
    found = executable.memory_analysis()
    parts = dict(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        aliased=found.alias_size_in_bytes,
    )
    total = sum(parts.values()) - 2 * parts["aliased"]
    memory = Memory(total, max(0, total - int(hbm_bytes)), **parts)
    return Compiled(memory, time.monotonic() - started, parse(text), executable)


def _too_large(error: jax.errors.JaxRuntimeError) -> Memory:
    """What a program needs that does not fit the chips' HBM; raises where the compiler complains about something else.

    Its first line says what ran out: HBM, or memory of one kernel (vmem, smem), which no other mesh mends.
    """
    line = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" not in line:
        raise error
    sizes = _SIZE.findall(line)
    if not re.search(r"\bhbm\b", line, re.IGNORECASE) or len(sizes) < 2:
        raise InputError(f"the compiler cannot compile this step ({line}); change training.attention or the batch")
    need, limit = (int(float(number) * _UNITS[unit]) for number, unit in sizes[:2])
    return Memory(need, need - limit)


def _with_text(
    lowered: jax.stages.Lowered, flags: Mapping[str, bool], on_tpu: bool
) -> tuple[jax.stages.Compiled, str]:
    """The executable and its optimised HLO.

    libtpu writes the text itself: what it hands over is parsed again by jaxlib, whose version may not know every
    operation (seen with the asynchronous ones of v5p and v6e).
    """
    if not on_tpu:
        executable = lowered.compile()
        return executable, executable.as_text()
    with tempfile.TemporaryDirectory(prefix="pivotjax-hlo-") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        executable = lowered.compile(compiler_options={**flags, **dump})
        return executable, next(Path(folder).glob("*.after_optimizations.txt")).read_text()


def backbone(step: Described, mesh: Mesh, program: Program | None) -> Backbone:
    """How often the frozen weights are there."""
    _, frozen, _ = step.arguments(mesh)
    leaves = jax.tree.leaves(frozen)
    whole = sum(_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    own = sum(_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    repeated = () if program is None else _repeated(program, frozen)
    return Backbone(whole, own, shards, own * shards / whole, repeated)


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize


def _repeated(program: Program, frozen: Any) -> tuple[str, ...]:
    """Instructions that make an array as large as a stack of matrices; loops only carry them, views make nothing."""
    stacks = [leaf for leaf in jax.tree.leaves(frozen) if len(leaf.shape) == 3]
    shapes = {tuple(sorted(shape)) for leaf in stacks for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))}
    passing = {"parameter", "get-tuple-element", "tuple", "while", "bitcast"}
    return tuple(
        f"{instruction.opcode} {instruction.shape.split('{')[0]}"
        for name in program.runs if name not in program.fused
        for instruction in program.computations[name].instructions.values()
        if instruction.opcode not in passing
        and any(tuple(sorted(a.dims)) in shapes and a.space == 0 for a in _made(instruction))
    )  # fmt: skip


def _made(instruction: Instruction) -> tuple[Array, ...]:
    """What an instruction makes; a `copy-start` names its source and a flag after it."""
    return instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays


_EXECUTABLE, _ABOUT = "step.executable", "about.json"


def check_target(folder: Path) -> None:
    """InputError where a step cannot be saved in `folder`: it holds anything but an earlier one, or is not writable."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {_EXECUTABLE, _ABOUT}):
        raise InputError(f"{folder} holds other files than a saved step; give another folder")
    files.output_folder(folder.absolute().parent)


def save(
    folder: Path, executable: jax.stages.Compiled, devices: list[jax.Device], about: Mapping[str, Any]
) -> None:
    """Writes a step compiled for these devices to a folder, whole or not at all, with what is known `about` it.

    InputError where the folder holds anything but an earlier saved step.
    """
    check_target(folder)
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / _EXECUTABLE).write_bytes(pickle.dumps(serialize_executable.serialize(executable)))
        digest = files.sha256(temporary / _EXECUTABLE)
        files.write_json(temporary / _ABOUT, {**about, "sha256": digest, "versions": versions(devices)})


def load(folder: Path, devices: list[jax.Device] | None = None) -> jax.stages.Compiled:
    """A saved step, ready to run on these devices (default: all that are there).

    Only for folders that you wrote yourself: loading an executable can run any code. InputError where the folder is
    damaged or was compiled by other versions or for other devices.
    """
    about = files.read_json(folder / _ABOUT)
    devices = devices or jax.devices()
    here = versions(devices)
    if files.sha256(folder / _EXECUTABLE) != about["sha256"]:
        raise InputError(f"{folder} is damaged; compile again")
    if about["versions"] != here:
        raise InputError(f"{folder} was compiled by {about['versions']}, here is {here}; compile again")
    payload, in_tree, out_tree = pickle.loads((folder / _EXECUTABLE).read_bytes())
    return serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )


def versions(devices: list[jax.Device]) -> dict[str, str]:
    """What an executable depends on."""
    return {"jax": jax.__version__, "platform": devices[0].client.platform_version, "device": devices[0].device_kind,
            "devices": str(len(devices))}  # fmt: skip
