"""What `pivotjax compile` advises: only what would change the step."""

from types import SimpleNamespace

import pytest

from pivotjax.tpu import flops, report
from pivotjax.training.optimizer import TrainingConfig

FULL, SPARE = 15 * 2**30, 2**30  # of 16 GiB


def advised(experts, samples, mesh, training, memory, binds=None):
    """The advice for a step of a device mesh `(expert, data, fsdp, tensor)`; it does not fit where nothing `binds`."""
    step = SimpleNamespace(
        work=flops.Work(experts, samples, 1, 16, 28, 12, False), training=TrainingConfig(**training)
    )
    line = None if binds is None else {"binds": binds, "step_seconds": 1.0, "compute_seconds": 0.5}
    memory = {"bytes": memory, "hbm_bytes": 16 * 2**30, "over": 2**30}
    sizes = dict(zip(("expert", "data", "fsdp", "tensor"), mesh))
    return " ".join(report.advice(step, {"mesh": sizes, "memory": memory, "roofline": line})[1:])


@pytest.mark.parametrize(
    ("experts", "samples", "mesh", "training", "said", "unsaid"),
    [
        # All that there is to change: half of the 64 rows at once, recomputation, weights over more chips.
        (4, 256, (1, 4, 4, 1), {}, ["device-batch 32", "remat layers", "larger --mesh.fsdp"], ["chips", "expert"]),
        # One chip, everything set: only another slice or shorter sequences.
        (1, 256, (1, 1, 1, 1), {"remat": "layers", "device_batch": 1}, ["more chips", "max-caption"],
         ["device-batch", "remat", "fsdp", "expert"]),
        # Four experts of a device have a row each at once, whatever `device_batch` below 4 says.
        (4, 256, (1, 1, 16, 1), {"device_batch": 4}, ["--mesh.expert", "remat layers"], ["device-batch", "fsdp"]),
        (4, 256, (1, 1, 16, 1), {"device_batch": 2}, ["--mesh.expert", "remat layers"], ["device-batch", "fsdp"]),
        (4, 256, (4, 1, 4, 1), {"device_batch": 1}, ["remat layers", "fsdp"], ["device-batch", "expert"]),
        # `accumulate` cuts already; what is proposed cuts further.
        (1, 8, (1, 1, 1, 1), {"accumulate": 4, "remat": "layers"}, ["device-batch 1"], ["remat", "fsdp", "chips"]),
        # Three experts do not spread over four chips.
        (3, 4, (1, 1, 4, 1), {"remat": "layers"}, ["more chips"], ["device-batch", "expert", "fsdp"]),
        # Weights that are cut over all chips cannot be cut further.
        (1, 4, (1, 1, 2, 2), {"remat": "layers"}, ["device-batch 1"], ["fsdp", "chips"]),
    ],
)  # fmt: skip
def test_of_a_step_that_does_not_fit(experts, samples, mesh, training, said, unsaid):
    found = advised(experts, samples, mesh, training, FULL)
    assert all(one in found for one in said) and not any(one in found for one in unsaid), found


@pytest.mark.parametrize(
    ("mesh", "training", "binds", "said", "unsaid"),
    [
        ((1, 1, 4, 1), {"device_batch": 2}, "ici", ["larger --training.device-batch", "smaller --mesh.fsdp"],
         ["training.batch", "accumulate", "tensor"]),
        ((1, 1, 4, 1), {"accumulate": 2}, "ici", ["smaller --training.accumulate"], ["batch"]),
        ((1, 1, 4, 1), {"accumulate": 2, "device_batch": 4}, "hbm",
         ["larger --training.device-batch and a smaller --training.accumulate", "splash"], ["training.batch"]),
        ((1, 1, 1, 4), {}, "ici", ["larger --training.batch (", "smaller --mesh.tensor"], ["device-batch", "fsdp"]),
        ((1, 1, 1, 1), {"attention": "splash"}, "hbm", ["larger --training.batch"], ["splash", "device-batch"]),
        ((1, 1, 1, 1), {"attention": "splash"}, "compute", ["max-caption", "more chips"], ["splash", "remat"]),
        ((1, 1, 1, 1), {"remat": "layers"}, "compute", ["remat dots"], ["more chips"]),
    ],
)  # fmt: skip
def test_of_a_limit_that_binds(mesh, training, binds, said, unsaid):
    found = advised(1, 32, mesh, training, FULL, binds)
    assert all(one in found for one in said) and not any(one in found for one in unsaid), found


@pytest.mark.parametrize(
    ("training", "room"),
    [
        ({}, "a larger --training.batch"),
        ({"device_batch": 8, "remat": "dots"}, "a larger --training.device-batch, --training.remat none"),
        ({"device_batch": 32}, "a larger --training.batch and --training.device-batch"),
    ],
)
def test_of_memory_that_stays_free(training, room):
    found = advised(1, 32, (1, 1, 1, 1), training, SPARE, "compute")
    assert found.endswith(f"15.0 GiB of a chip stay free: room for {room}")
