"""What `pivotjax compile` says about a step on a slice: one mapping for programs, one table for people."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pivotjax.tpu import collectives, flops, traffic
from pivotjax.tpu.collectives import Collective
from pivotjax.tpu.compile import Compiled, Described, backbone
from pivotjax.tpu.roofline import Roofline, roofline
from pivotjax.tpu.topology import Slice
from pivotjax.training.parallel import MeshConfig
from pivotjax.training.step import micro_batches

_ESTIMATES = "rooflines: what the chips' limits allow, not measured; a run is slower"


def report(step: Described, where: Slice, mesh: Mesh, done: Compiled, caption_tokens: float = 0.0) -> dict[str, Any]:
    """Everything about a compiled step, as plain values.

    Where it does not fit the chip's memory, `memory.fits` is False and what needs the program (`flops.executed`, `hbm`,
    `collectives`, `roofline`) is None.

    Args:
        caption_tokens: mean tokens of a caption, for the share of padding; 0: not known.
    """
    work, training, fits = step.work, step.training, done.program is not None
    minimum = step.minimum()
    found = collectives.find(done.program, mesh.size) if fits else []
    executed = flops.executed(done.program) if fits else None
    kernels = _of_kernels(executed, minimum, mesh) if fits else 0.0
    line = _roofline(step, where, mesh, done, found, kernels) if fits else None
    values = {
        "slice": {"name": where.accelerator_type, "topology": where.topology, "chips": where.chips,
                  "hosts": where.hosts, "source": where.source},
        "mesh": dict(mesh.shape),
        "step": {
            "experts": work.experts, "samples_per_expert": work.samples, "samples": work.experts * work.samples,
            "tokens_per_sample": work.length, "targets_per_sample": work.targets,
            "padding": _padding(step, caption_tokens), "remat": training.remat,
            "device_batch": training.device_batch, "accumulate": training.accumulate,
            "images_encoded_in_step": work.online, "steps": training.steps,
        },
        "memory": _memory(step, where, mesh, done),
        "flops": _flops(step, mesh, executed, kernels, minimum),
        "hbm": {"bytes": traffic.hbm_bytes(done.program)} if fits else None,
        "collectives": _by_kind(found) if fits else None,
        "roofline": None if line is None else {**line._asdict(), "estimate": _ESTIMATES},
        "compiler": {"seconds": done.seconds, "jax": jax.__version__, "unknown_loops": len(done.program.unknown_loops)
                     if fits else None},
    }  # fmt: skip
    return values | {"advice": advice(step, values)}


def _roofline(
    step: Described, where: Slice, mesh: Mesh, done: Compiled, found: Sequence[Collective], kernels: float
) -> Roofline:
    coordinates = np.array([device.coords for device in mesh.devices.flat])[:, : len(where.wraps)]
    samples, least = step.work.experts * step.work.samples * step.work.images, step.minimum().total
    return roofline(done.program, found, where, coordinates, least, samples, step.training.steps, kernels)


def _of_kernels(executed: flops.Executed, minimum: flops.Minimum, mesh: Mesh) -> float:
    """FLOPs of one device in custom kernels, which attention is for: by its formula, as their HLO does not tell."""
    return float(minimum.attention) / mesh.size if executed.kernels else 0.0


def _padding(step: Described, caption_tokens: float) -> float | None:
    """Share of a sequence's tokens that captions leave empty."""
    work = step.work
    return work.images * max(0.0, work.targets / work.images - caption_tokens) / work.length if caption_tokens else None


def _memory(step: Described, where: Slice, mesh: Mesh, done: Compiled) -> dict[str, Any]:
    state, _, batch = step.arguments(mesh)
    once = backbone(step, mesh, done.program)
    return {
        **done.memory._asdict(),
        "hbm_bytes": int(where.hbm_bytes),
        "fits": done.memory.fits,
        "state": _own_bytes(state),
        "batch": _own_bytes(batch),
        "backbone": {**once._asdict(), "repeated": list(once.repeated)},
    }


def _own_bytes(tree: Any) -> int:
    """Of one device."""
    return int(sum(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree)))  # fmt: skip


def _flops(
    step: Described, mesh: Mesh, executed: flops.Executed | None, kernels: float, minimum: flops.Minimum
) -> dict[str, Any]:
    least = float(minimum.total) / mesh.size
    values = {"minimum": least, "minimum_parts": {k: float(v) / mesh.size for k, v in minimum._asdict().items()}}
    if executed is None:
        return values | dict.fromkeys(("executed", "recomputed", "ratio_to_minimum", "ratio_with_recomputation"))
    total = executed.total + kernels
    return values | {
        "executed": total,
        "recomputed": executed.recomputed,
        "ratio_to_minimum": (total - executed.recomputed) / least,
        "ratio_with_recomputation": total / least,
        "traced": flops.asked(step.traced(mesh, step.without_remat()).jaxpr) / mesh.size,
        "kernels": executed.kernels,
        "kernels_by_formula": kernels,
    }


def _by_kind(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Collectives by kind and by whether they run beside products, the largest first."""
    groups: dict[tuple[str, bool], list[Collective]] = defaultdict(list)
    for one in found:
        groups[one.kind, one.overlapped].append(one)
    rows = [
        {"kind": kind, "overlapped": beside, "runs": sum(one.times for one in members),
         "bytes": sum(one.times * one.bytes for one in members), "sent_bytes": sum(one.sent for one in members)}
        for (kind, beside), members in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["sent_bytes"])


def advice(step: Described, values: dict[str, Any]) -> list[str]:
    """What binds, and what to change: only what would change something."""
    memory, line = values["memory"], values["roofline"]
    if line is None:
        return [
            f"does not fit: {_gib(memory['over'])} GiB more than the compiler may use of a chip's "
            f"{_gib(memory['hbm_bytes'])} GiB",
            f"change: {', or '.join(_less_memory(step, values['mesh']))}",
        ]
    waits = line["step_seconds"] - line["compute_seconds"]
    said = [f"{line['binds']} binds; for {waits:.3f} s of {line['step_seconds']:.3f} s chips wait for memory or links"]
    said.append(f"change: {', or '.join(_faster(step, values['mesh'], line['binds']))}")
    free = memory["hbm_bytes"] - memory["bytes"]
    if free > 0.5 * memory["hbm_bytes"]:
        room = [_more_at_once(step, values["mesh"])]
        room += ["a smaller --mesh.fsdp"] if values["mesh"]["fsdp"] > 1 else []
        room += ["--training.remat none"] if step.training.remat != "none" else []
        said.append(f"{free / 2**30:.1f} GiB of a chip stay free: room for {', '.join(room)}")
    return said


def _less_memory(step: Described, mesh: dict[str, int]) -> list[str]:
    """What makes a device need less."""
    experts, rows = _on_device(step, mesh)
    now = micro_batches(step.training, experts, rows)
    more = next((parts for parts in range(now + 1, rows + 1) if rows % parts == 0), None)
    chips, found = math.prod(mesh.values()), []
    if more is not None:
        found.append(f"--training.device-batch {experts * rows // more}")
    elif math.gcd(experts, chips // mesh["expert"]) > 1:
        found.append("a larger --mesh.expert (a device takes a sample of each of its experts at once)")
    if step.training.remat != "layers":
        found.append("--training.remat layers")
    if mesh["fsdp"] * mesh["tensor"] < chips:
        found.append("a larger --mesh.fsdp")
    return found or ["more chips", "a shorter --data.max-caption"]


def _faster(step: Described, mesh: dict[str, int], binds: str) -> list[str]:
    """What eases the limit that binds."""
    training = step.training
    if binds == "compute" and training.remat == "layers":
        return ["--training.remat dots, which computes a third less again, where memory allows"]
    splash = ["--training.attention splash (scores stay on the chip)"] if training.attention != "splash" else []
    if binds == "compute":
        return [*splash, "fewer tokens (a shorter --data.max-caption)", "more chips"]
    at_once = f"{_more_at_once(step, mesh)} (weights are read and gathered once a part)"
    if binds == "hbm":
        return [at_once, *splash]
    return [at_once, *(f"a smaller --mesh.{axis}" for axis in ("fsdp", "tensor") if mesh[axis] > 1)]


def _more_at_once(step: Described, mesh: dict[str, int]) -> str:
    """What makes the parts of a batch larger."""
    training, (experts, rows) = step.training, _on_device(step, mesh)
    now = micro_batches(training, experts, rows)
    if now == 1:
        return "a larger --training.batch" + (" and --training.device-batch" if training.device_batch else "")
    ways = {
        "a larger --training.device-batch": replace(training, device_batch=0),
        "a smaller --training.accumulate": replace(training, accumulate=1),
    }
    enough = [said for said, other in ways.items() if micro_batches(other, experts, rows) < now]
    return ", or ".join(enough) or " and ".join(ways)


def _on_device(step: Described, mesh: dict[str, int]) -> tuple[int, int]:
    """Experts of a device, and rows of each in a step."""
    return step.work.experts // mesh["expert"], step.work.samples // (mesh["data"] * mesh["fsdp"])


def table(values: dict[str, Any]) -> str:
    """For people."""
    where, given, memory, line = (values[name] for name in ("slice", "step", "memory", "roofline"))
    mesh = " x ".join(f"{name} {size}" for name, size in values["mesh"].items())
    padding = "" if given["padding"] is None else f", {given['padding']:.1%} of them padding"
    rows = [
        ("recipe", values["recipe"]),
        ("run with", values["flags"]),
        ("slice", f"{where['name']}: {where['chips']} chips, {where['hosts']} hosts; mesh {mesh}"),
        ("step", f"{given['experts']} experts x {given['samples_per_expert']} samples x {given['tokens_per_sample']} "
                 f"tokens{padding}; remat {given['remat']}, at most {given['device_batch'] or 'all'} samples at once"),
        ("memory", f"{'fits' if memory['fits'] else 'DOES NOT FIT'}: {_gib(memory['bytes'])} of "
                   f"{_gib(memory['hbm_bytes'])} GiB a chip"),
    ]  # fmt: skip
    if memory["arguments"] is not None:
        kinds = ("arguments", "outputs", "aliased", "temporaries", "code")
        rows.append(("", ", ".join(f"{kind} {_gib(memory[kind])}" for kind in kinds)))
    once = memory["backbone"]
    rows.append(
        ("backbone", f"{once['copies']:.3f} copies over {once['shards']} chips, {_gib(once['per_device'])} GiB a chip; "
                     f"arrays repeated in the step: {len(once['repeated'])}")
    )  # fmt: skip
    if line is not None:
        rows += _of_program(values)
    rows += [("", said) for said in values["advice"]]
    rows.append(("compiled", f"in {values['compiler']['seconds']:.0f} s with jax {values['compiler']['jax']}"))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _of_program(values: dict[str, Any]) -> list[tuple[str, str]]:
    arithmetic, line = values["flops"], values["roofline"]
    rows = [
        ("FLOPs", f"{arithmetic['executed'] / 1e12:.2f} T a chip, {arithmetic['ratio_to_minimum']:.3f} x the minimum; "
                  f"recomputed {arithmetic['recomputed'] / 1e12:.2f} T, with them "
                  f"{arithmetic['ratio_with_recomputation']:.3f} x; traced {arithmetic['traced'] / 1e12:.2f} T"),
        ("HBM", f"{values['hbm']['bytes'] / 1e9:.1f} GB a chip (estimate)"),
    ]  # fmt: skip
    for row in values["collectives"]:
        beside = "beside products" if row["overlapped"] else "not beside products"
        sent = f"{row['sent_bytes'] / 1e9:.2f} GB sent a chip"
        rows.append(("ICI", f"{row['kind']}: {sent} in {row['runs']} runs, {beside}"))
    rows += [
        ("estimate", f"compute {line['compute_seconds']:.3f} s, HBM {line['hbm_seconds']:.3f} s, ICI "
                     f"{line['ici_seconds']:.3f} s ({line['ici_exposed_seconds']:.3f} s exposed)"),
        ("estimate", f"step {line['step_seconds']:.3f} s, MFU {line['mfu']:.1%}, {line['samples_per_second']:.0f} "
                     f"samples/s"),
        ("estimate", f"{values['step']['steps']} steps in {line['hours']:.2f} h, {line['chip_hours']:.0f} chip-hours "
                     f"({_ESTIMATES})"),
    ]  # fmt: skip
    return rows


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def ways(rows: Sequence[tuple[MeshConfig, dict[str, Any]]]) -> str:
    """A sweep's results, one line a way."""
    lines = ["expert data fsdp tensor  batch  remat   at once   GiB   fits  estimated step  MFU    samples/s"]
    for mesh, values in rows:
        given, memory, line = values["step"], values["memory"], values["roofline"]
        sizes = "{:6d} {:4d} {:4d} {:6d}".format(*astuple(mesh))
        speed = "-" if line is None else (
            f"{line['step_seconds']:11.3f} s  {line['mfu']:5.1%}  {line['samples_per_second']:9.0f}"
        )  # fmt: skip
        lines.append(f"{sizes}  {given['samples_per_expert']:5d}  {given['remat']:7s} {given['device_batch']:6d}  "
                     f"{memory['bytes'] / 2**30:6.2f}  {'yes' if memory['fits'] else 'no':4s} {speed}")  # fmt: skip
    return "\n".join(lines)
