"""`pivotjax pipeline` on one device, on 8, and on 2 processes: the same projectors, merges and numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import COMMAND, environment, on_hosts
from tiny_world import llava_corpus, recipe

from pivotjax.checkpoints import store
from pivotjax.errors import InputError
from pivotjax.jobs.assemble import DataConfig
from pivotjax.jobs.pipeline import PipelineConfig
from pivotjax.merging import merge

RUNS = {  # processes, devices of each, mesh
    "one": (1, 1, {}),
    "eight": (1, 8, {"expert": 2, "data": 2, "fsdp": 2}),
    "two": (2, 2, {"expert": 2, "data": 2}),
    "cut": (2, 1, {"fsdp": 2}),  # the frozen weights lie in two processes
}
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run
MERGES = {
    "ties": {"method": "ties", "density": 0.3},
    "pivot": {"method": "pivot"},
    "regmean": {"method": "regmean", "calibrated": True},
    "fisher": {"method": "fisher", "calibrated": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    recipe(
        folder,
        {name: llava_corpus(folder / name, 60, k) for k, name in enumerate(("left", "right"), 1)},
        {"calibration": 8, "test": 10},
        training={"steps": 6, "batch": 4, "learning_rate": 0.01, "log_every": 1},
        checkpoints={"every_steps": 3},
        merges=MERGES,
        export="pivot",
        measure={"choices": 3, "control_items": 4, "resamples": 50},
    )
    return folder


def start(world, name):
    """Runs the command in all its processes."""
    count, devices, mesh = RUNS[name]
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    env = environment(XLA_FLAGS=flags, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    command = [*COMMAND, "pipeline", world / "recipe.yaml", "--out", world / name]
    command += [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", size)]
    return on_hosts(count, command, env)


@pytest.fixture(scope="module")
def said(world):
    return {name: start(world, name) for name in RUNS}


def projectors(folder):
    names = [f"projectors/{name}" for name in ("w0", "left", "right")] + [f"merges/{name}/projector" for name in MERGES]
    return {name: store.load_projector(folder / name).params for name in names}


def flat(params):
    return np.concatenate([np.ravel(leaf) for layer in params.values() for leaf in layer.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight", "two", "cut"])
def test_any_devices_give_the_same_projectors_and_numbers(world, said, name):
    here, there = projectors(world / "one"), projectors(world / name)
    for what in here:
        moved = np.abs(flat(here[what]) - flat(here["projectors/w0"])).max()
        assert moved > 1e-3 or what.endswith("w0")
        # TIES cuts at a rank: a rounding may put one entry on the other side of it.
        error = np.abs(flat(here[what]) - flat(there[what])) / max(moved, 1)
        assert (error > 1e-4).mean() < (0.002 if "ties" in what else 1e-9), what
    with np.load(world / "one" / "outcomes.npz") as one, np.load(world / name / "outcomes.npz") as spread:
        assert one["left/nll"].shape == (3 + len(MERGES), 10)
        for key in ("left/nll", "right/nll", "left/control_nll"):
            np.testing.assert_allclose(spread[key], one[key], rtol=2e-3)


@pytest.mark.slow
def test_a_merge_on_devices_is_the_merge_of_what_was_saved(world, said):
    found = projectors(world / "eight")
    experts = {name: found[f"projectors/{name}"] for name in ("left", "right")}
    for name, plan in MERGES.items():
        options = {key: value for key, value in plan.items() if key not in ("method", "calibrated")}
        if not plan.get("calibrated"):
            alone = merge(found["projectors/w0"], experts, plan["method"], **options).params
            np.testing.assert_allclose(flat(found[f"merges/{name}/projector"]), flat(alone), atol=1e-5)


@pytest.mark.slow
def test_only_the_first_process_speaks_and_everything_is_written(world, said):
    for name in ("two", "cut"):
        assert "merging: pivot" in said[name][0] and "merging" not in said[name][1]
    for name in RUNS:
        held = {str(path.relative_to(world / name)) for path in (world / name).rglob("*") if path.is_file()}
        assert {"report.html", "report.json", "export/mm_projector.safetensors", "metrics.jsonl"} <= held
        report = json.loads((world / name / "merges" / "pivot" / "merge_report.json").read_text())
        assert report["method"] == "pivot" and report["experts"] == ["left", "right"]
        assert all(np.isfinite(norm) for norm in report["layers"]["linear_0"]["update_norms"].values())


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(InputError, match="joint"):
        PipelineConfig(Path("x"), joint=True)
    with pytest.raises(InputError, match="method"):
        PipelineConfig(Path("x"), merges={"pivot": {}})
    with pytest.raises(InputError, match="unknown merge method"):
        PipelineConfig(Path("x"), merges={"pivot": {"method": "pivott"}})
    with pytest.raises(InputError, match="no option 'densiti'"):
        PipelineConfig(Path("x"), merges={"pivot": {"method": "ties", "densiti": 0.3}})
    with pytest.raises(InputError, match="calibrated: true"):
        PipelineConfig(Path("x"), merges={"pivot": {"method": "regmean"}})
    with pytest.raises(InputError, match="export"):
        PipelineConfig(Path("x"), export="mean")
    with pytest.raises(InputError, match="did you mean outlines"):
        PipelineConfig(Path("x"), unseen=("outlinez",))
    with pytest.raises(InputError, match="emojy"):
        PipelineConfig(Path("x"), merges={"pivot": {"method": "task_arithmetic", "weights": {"emojy": 1, "icons": 2}}})
    with pytest.raises(InputError, match="no option 'name'"):
        PipelineConfig(Path("x"), merges={"pivot": {"method": "ties", "name": "x"}})
    for name in ("w0", "expert:left", "a/b", "..", ""):
        with pytest.raises(InputError, match="cannot be a merge's name"):
            PipelineConfig(Path("x"), merges={name: {"method": "pivot"}}, export=name)
    with pytest.raises(InputError, match="one domain only"):
        PipelineConfig(Path("x"), data=DataConfig(domains=("icons",)))
