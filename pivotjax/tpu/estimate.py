"""A rough model of memory and time of a step, to choose what is worth compiling. The compiler has the last word."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import NamedTuple

import jax
import numpy as np

from pivotjax.tpu import flops
from pivotjax.tpu.compile import Described
from pivotjax.tpu.topology import Slice
from pivotjax.training.optimizer import TrainingConfig
from pivotjax.training.parallel import MeshConfig

_REMAT = ("none", "dots", "layers")
_ROWS = (1, 2, 4, 8, 16, 32, 64)  # samples that a device takes at once
_MARGIN = 1.25  # the model may be so far off before a candidate is left out


class Candidate(NamedTuple):
    """One way to run a step.

    Fields:
        mesh, training: the way.
        samples: rows of an expert in a step.
        bytes: what a device needs, roughly.
        seconds: what a sample takes, roughly.
    """

    mesh: MeshConfig
    training: TrainingConfig
    samples: int
    bytes: float
    seconds: float


def candidates(step: Described, where: Slice, batches: tuple[int, ...]) -> list[Candidate]:
    """Ways to run a step that could fit: first those that should, the fastest of them first, then those that may.

    Of ways that differ only in how the batch is spread, the one that needs the least memory.
    """
    found = [_candidate(step, where, *way) for way in _ways(step, where, batches)]
    fitting = sorted((one for one in found if one.bytes <= _MARGIN * where.hbm_bytes), key=lambda one: -one.bytes)
    kinds = {(one.samples, one.mesh.fsdp, one.mesh.tensor, *_way(one.training)): one for one in fitting}
    return sorted(kinds.values(), key=lambda one: (one.bytes > where.hbm_bytes, one.seconds, one.bytes))


def _way(training: TrainingConfig) -> tuple[str, int]:
    return training.remat, training.device_batch


def _ways(step: Described, where: Slice, batches: tuple[int, ...]) -> Iterator[tuple[MeshConfig, str, int, int]]:
    work, heads = step.work, step.decoder.num_kv_heads
    powers = [2**i for i in range(where.chips.bit_length())]
    rows_of = [batch * work.samples // step.training.batch for batch in batches or (step.training.batch,)]
    for samples, fsdp, tensor, expert in itertools.product(rows_of, powers, (1, 2, 4, 8), powers):
        data = where.chips // (fsdp * tensor * expert)
        whole = data >= 1 and work.experts % expert == 0 and samples % (data * fsdp) == 0 and heads % tensor == 0
        if not whole or (tensor > 1 and tensor > fsdp):
            continue
        own = work.experts // expert * samples // (data * fsdp)
        least = work.experts // expert
        for remat, rows in itertools.product(_REMAT, _ROWS):
            if least <= rows <= own and own % rows == 0:
                yield MeshConfig(expert, data, fsdp, tensor), remat, rows, samples


def _candidate(step: Described, where: Slice, mesh: MeshConfig, remat: str, rows: int, samples: int) -> Candidate:
    batch = step.training.batch * samples // step.work.samples
    steps = math.ceil(step.training.steps * step.work.samples / samples)  # as many samples as the recipe's steps take
    training = replace(step.training, accumulate=1, device_batch=rows, remat=remat, batch=batch, steps=steps)
    work = step.work._replace(samples=samples)
    total = work.experts * samples
    parts = max(1, total // (mesh.expert * mesh.data * mesh.fsdp) // rows)
    return Candidate(mesh, training, samples, _memory(step, mesh, remat, rows),
                     _seconds(replace(step, work=work), where, mesh, remat, parts) / total)  # fmt: skip


def _memory(step: Described, mesh: MeshConfig, remat: str, rows: int) -> float:
    """Bytes of a device: frozen weights, state, what a backward pass keeps of every layer, and one layer's working set.

    Products with weights that are kept are those of `dots`; `none` keeps the scores of attention and what lies between
    the products too.
    """
    decoder, work = step.decoder, step.work
    cut = mesh.fsdp * mesh.tensor
    frozen = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.frozen)) / cut
    state = 3 * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.w0)) * work.experts / mesh.expert
    size = step.frozen["language"]["embedding"].dtype.itemsize
    tokens = rows * work.length
    heads = decoder.num_heads * decoder.head_dim
    products = (heads + 2 * decoder.num_kv_heads * decoder.head_dim + 2 * decoder.mlp_dim) / mesh.tensor + decoder.dim
    scores = rows * decoder.num_heads / mesh.tensor * work.length**2
    kept = {
        "layers": tokens * decoder.dim * size,
        "dots": tokens * (decoder.dim + products) * size,
        "none": tokens * (3 * decoder.dim + 2 * products) * size + scores * (size + 1),
    }[remat]
    layer = flops.decoder_entries(decoder) / decoder.num_layers * size / mesh.tensor
    working = tokens * 3 * products * size + scores * 6 + 4 * layer
    head = rows * min(work.targets, step.training.loss_chunk) * decoder.vocab_size * 8 / mesh.tensor
    return frozen + 2 * state + decoder.num_layers * kept + working + head


def _seconds(step: Described, where: Slice, mesh: MeshConfig, remat: str, parts: int) -> float:
    """Arithmetic at the peak, or weights gathered twice a part at the links' rate, whatever is longer; activations that
    `tensor` devices sum four times a layer come on top."""
    minimum = step.minimum()
    again = {"none": 0.0, "dots": 0.02, "layers": 0.5}[remat]
    compute = (minimum.total + again * minimum.decoder) / where.chips / where.peak_flops
    weights = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.frozen)) / mesh.tensor
    rate = where.ici_gbps * 1e9 / len(where.wraps)
    gathered = 2 * parts * weights * (mesh.fsdp - 1) / mesh.fsdp / rate
    work = step.work
    tokens = work.experts * work.samples * work.length / (mesh.expert * mesh.data * mesh.fsdp)
    summed = 8 * step.decoder.num_layers * tokens * step.decoder.dim * 2 * (mesh.tensor - 1) / mesh.tensor / rate
    return max(compute, gathered) + summed


def flags(mesh: MeshConfig, training: TrainingConfig) -> str:
    """What to give `pivotjax pretrain` for a way to run a step."""
    sizes = zip(("expert", "data", "fsdp", "tensor"), astuple(mesh))
    given = [f"--mesh.{name} {size}" for name, size in sizes]
    given += [f"--training.steps {training.steps}", f"--training.batch {training.batch}"]
    given += [f"--training.remat {training.remat}"]
    given += [f"--training.device-batch {training.device_batch}", f"--training.accumulate {training.accumulate}"]
    return " ".join(given)
