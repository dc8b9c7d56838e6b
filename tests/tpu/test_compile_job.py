"""`pivotjax compile` on one small slice: a small model through the real TPU compiler, once, and what is said of it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pivotjax import cli
from pivotjax.errors import InputError
from pivotjax.jobs import compile as job
from pivotjax.tpu import compile as ahead
from pivotjax.tpu import estimate, flops, hlo, topology
from pivotjax.training import parallel

ROOT = Path(__file__).parents[2]
V5E4 = ROOT / "tpu_configs" / "v5e-4.yaml"
SMALL = dict(
    model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
TOWER = dict(
    model_type="clip_vision_model", image_size=32, patch_size=4, hidden_size=128, intermediate_size=256,
    num_hidden_layers=3, num_attention_heads=4,
)  # fmt: skip
RECIPE = """
out: nowhere
model: {{vision: {folder}/tower, language: {folder}/small, dtype: bfloat16}}
data: {{domains: [emoji, shapes], template: plain, max_caption: 17, features: online}}
training: {{steps: 100, batch: 16, remat: layers, loss_chunk: 17}}
mesh: {{data: 1, fsdp: 4}}
"""


@pytest.fixture
def recipe(tmp_path):
    for name, settings in (("small", SMALL), ("tower", TOWER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    crop = dict(height=32, width=32)
    pixels = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=crop)
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(pixels))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.fixture(autouse=True)
def _command(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "compile", "")


@pytest.mark.tpu
@pytest.mark.slow
def test_a_small_step_on_four_chips(tpu, recipe, tmp_path, done):
    said = done("compile", recipe, "--tpu", V5E4, "--json", tmp_path / "a.json", "--save", tmp_path / "saved",
                "--caption-tokens", "9")  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    memory, arithmetic, line = found["memory"], found["flops"], found["roofline"]

    assert memory["fits"] and 0 < memory["bytes"] < memory["hbm_bytes"] == 16 * 2**30 and memory["over"] == 0
    parts = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]
    assert memory["bytes"] == parts
    own = memory["state"] + memory["batch"] + memory["backbone"]["per_device"]
    assert memory["arguments"] == pytest.approx(own, rel=0.05)  # arrays are padded to the layout's tiles
    assert memory["aliased"] == pytest.approx(memory["state"], rel=0.05)  # the state is updated in place
    assert memory["backbone"]["copies"] == pytest.approx(1, abs=0.05) and memory["backbone"]["repeated"] == []

    # The compiler executes what JAX traced, and little more than the least.
    assert arithmetic["executed"] - arithmetic["recomputed"] == pytest.approx(arithmetic["traced"], rel=0.02)
    assert 1 <= arithmetic["ratio_to_minimum"] <= 1.10
    assert arithmetic["ratio_with_recomputation"] > arithmetic["ratio_to_minimum"] + 0.2  # remat: layers
    assert arithmetic["kernels"] == found["compiler"]["unknown_loops"] == 0
    assert found["step"]["padding"] == pytest.approx((17 - 9) / (64 + 17 - 1), rel=0.02)

    assert {row["kind"] for row in found["collectives"]} >= {"all-gather", "all-reduce"}
    assert line["step_seconds"] >= max(line["compute_seconds"], line["ici_exposed_seconds"])
    assert line["samples_per_second"] == pytest.approx(32 / line["step_seconds"])
    assert line["hours"] == pytest.approx(100 * line["step_seconds"] / 3600)
    assert line["chip_hours"] == pytest.approx(4 * line["hours"])
    assert 0 < line["mfu"] < 1 and line["binds"] in ("compute", "hbm", "ici") and "estimate" in line

    assert "fits" in said.out and said.out.count("estimate") >= 3 and "Failed to find host bounds" not in said.err
    assert (tmp_path / "saved" / "step.executable").stat().st_size > 10_000
    with pytest.raises(InputError, match=r"was compiled by .*TPU.*here is.*compile again"):
        ahead.load(tmp_path / "saved")


@pytest.mark.tpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_says_by_how_much(tpu, recipe, tmp_path, done):
    big = ("--data.max-caption", "20001", "--training.batch", "64", "--training.loss-chunk", "20001")
    said = done("compile", recipe, "--tpu", V5E4, "--json", "-", "--save", tmp_path / "saved", *big)
    assert "does not fit, so nothing is saved" in said.err and not (tmp_path / "saved").exists()
    found = json.loads(said.out)
    memory = found["memory"]
    room = memory["bytes"] - memory["over"]  # what the runtime leaves of a chip's memory
    assert not memory["fits"] and 0.9 * 16 * 2**30 < room < memory["hbm_bytes"] == 16 * 2**30
    assert found["roofline"] is None and found["flops"]["ratio_to_minimum"] is None and found["flops"]["minimum"] > 0
    assert "does not fit" in found["advice"][0] and "--training.device-batch" in found["advice"][1]


def test_what_a_saved_step_gives_is_what_it_gave(tmp_path):
    """On this machine's own devices, where it can run."""
    lowered = jax.jit(lambda x, y: {"sum": x + y}).lower(np.float32(1), np.float32(2))
    ahead.save(tmp_path / "saved", lowered.compile(), jax.devices(), {"what": "a sum"})
    assert ahead.load(tmp_path / "saved")(np.float32(3), np.float32(4))["sum"] == 7
    (tmp_path / "saved" / "step.executable").write_bytes(b"x")
    with pytest.raises(InputError, match="is damaged"):
        ahead.load(tmp_path / "saved")


def test_nothing_but_a_saved_step_is_replaced(recipe, refused, tmp_path):
    """And what could not be written in the end is said before anything is compiled."""
    saved, run = tmp_path / "saved", tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert "holds other files than a saved step" in refused("compile", recipe, "--tpu", V5E4, "--save", run)
    assert "is a folder" in refused("compile", recipe, "--tpu", V5E4, "--json", run)
    assert "cannot write" in refused("compile", recipe, "--tpu", V5E4, "--json", run / "metrics.jsonl" / "a.json")
    executable = jax.jit(lambda x: x).lower(np.float32(1)).compile()
    for number in range(2):
        ahead.save(saved, executable, jax.devices(), {"number": number})
    assert json.loads((saved / "about.json").read_text())["number"] == 1
    with pytest.raises(InputError, match="holds other files"):
        ahead.save(run, executable, jax.devices(), {})
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_what_the_compiler_says_of_memory():
    hbm = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (48.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.\nSee https://openxla.org/xla"
    )
    assert ahead._too_large(jax.errors.JaxRuntimeError(hbm)) == (48 * 2**30, 32.25 * 2**30, *(None,) * 5)
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem: size 20.00M and limit 16.00M\nheap: 8.00G hbm"
    with pytest.raises(InputError, match=r"cannot compile this step \(RESOURCE_EXHAUSTED: .* limit 16.00M\)"):
        ahead._too_large(jax.errors.JaxRuntimeError(vmem))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        ahead._too_large(jax.errors.JaxRuntimeError("INTERNAL: 1.00G of 2.00G hbm"))


@pytest.fixture
def sweep(tpu, recipe, monkeypatch, done):
    """Sweeps with a table in the compiler's place: what needs more than `room` samples at once does not fit."""

    def run(room, *args):
        tried = []

        def compiled(step, mesh, hbm_bytes, flags):
            tried.append((dict(mesh.shape), step.training.remat, step.training.device_batch))
            fits = step.training.device_batch <= room
            program = hlo.parse("ENTRY %e (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4] parameter(0)\n}")
            memory = ahead.Memory(2**30, 0) if fits else ahead.Memory(2**35, 2**34)
            return ahead.Compiled(memory, 1.0, program if fits else None, None)

        def reported(step, where, mesh, done, captions):
            line = {"samples_per_second": step.training.device_batch, "step_seconds": 1, "mfu": 0.5}
            given = dict(samples_per_expert=1, remat=step.training.remat, device_batch=step.training.device_batch)
            memory = done.memory._asdict() | {"fits": done.memory.fits}
            return {"memory": memory, "roofline": line if done.program else None, "step": given}

        monkeypatch.setattr(ahead, "compiled", compiled)
        monkeypatch.setattr(job.report, "report", reported)
        monkeypatch.setattr(job.report, "table", lambda values: values["flags"])
        return tried, done("compile", recipe, "--tpu", V5E4, "--sweep", *args)

    return run


@pytest.mark.tpu
def test_a_sweep_compiles_the_most_promising_and_prints_the_best(sweep):
    tried, said = sweep(2, "--sweep-limit", "100")
    assert len(tried) == len({json.dumps(one) for one in tried}) > 5
    heading, best = said.out.splitlines()[-2:]
    assert heading == "best:" and "--training.device-batch 2" in best and "--mesh.fsdp" in best


@pytest.mark.tpu
def test_a_sweep_in_which_nothing_fits_says_so(sweep):
    _, said = sweep(0, "--sweep-limit", "3")
    assert "none of the 3 tried fits; raise --sweep-limit" in said.out and "best:" not in said.out


@pytest.mark.tpu
def test_a_sweep_goes_on_where_a_way_cannot_be_compiled(sweep, monkeypatch):
    made, calls = parallel.make_mesh, []

    def make_mesh(*args):
        calls.append(args)
        if len(calls) == 1:
            raise InputError("no such torus")
        return made(*args)

    monkeypatch.setattr(parallel, "make_mesh", make_mesh)
    tried, said = sweep(64, "--sweep-limit", "3")
    assert len(tried) == 2 and said.err.count(": no such torus") == 1 and "best:" in said.out


@pytest.mark.tpu
@pytest.mark.parametrize("path", sorted(V5E4.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_way_of_a_sweep_has_a_mesh(tpu, path):
    """Over all chips of the slice; a torus's axis is split where that takes it."""
    args = [str(ROOT / "train" / "llava15-7b-cc12m.yaml"), "--tpu", str(path)]
    config = job.configs.parse(job.CompileConfig, args, "compile")
    where = topology.load(path)
    step = job.shapes.described(config.model, config.data, config.training, (4, 256))
    ways = {(one.mesh, one.samples) for one in estimate.candidates(step, where, (256, 512))}
    assert ways or where.hbm_gib * where.chips < 20
    for mesh, samples in ways:
        made = parallel.make_mesh(mesh, 4, samples, where.devices())
        assert len(set(made.devices.flat)) == where.chips and job.MeshConfig(**made.shape) == mesh


def test_the_rough_model_prefers_what_fits_and_is_fast(recipe):
    config = job.configs.parse(job.CompileConfig, [str(recipe), "--tpu", str(V5E4)], "compile")
    where = topology.load(V5E4)
    step = job.shapes.described(config.model, config.data, config.training, (2, 16))
    found = estimate.candidates(step, where, (16, 32))
    assert found == sorted(found, key=lambda one: (one.bytes > where.hbm_bytes, one.seconds, one.bytes))
    assert {(one.samples, one.training.batch, one.training.steps) for one in found} == {(16, 16, 100), (32, 32, 50)}
    assert all(f"--training.steps {one.training.steps} " in estimate.flags(one.mesh, one.training) for one in found)
    kept = {(one.mesh, one.training.device_batch, one.samples, one.training.remat): one.bytes for one in found}
    compared = [(key, size) for key, size in kept.items() if key[3] == "dots"]
    for (mesh, rows, samples, _), size in compared:
        assert kept[mesh, rows, samples, "layers"] < size < kept[mesh, rows, samples, "none"]
    assert len(compared) > 5
    assert not estimate.candidates(step, job.replace(where, hbm_gib=1e-4), ())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--tpu"),
        (["--tpu", "nowhere.yaml"], "cannot read"),
        (["--tpu", str(V5E4), "--model.language", "models/no-such-llm"], "sizes are not known; give a folder"),
        (["--tpu", str(V5E4), "--mesh.fsdp", "3"], "needs 3 devices, 4 are there"),
        (["--tpu", str(V5E4), "--training.batch", "3"], "cannot be spread evenly"),
        (["--tpu", str(V5E4), "--parallel", "pmap"], "compile knows jit alone"),
    ],
)
def test_wrong_input_is_one_line(recipe, refused, args, said):
    pytest.importorskip("libtpu", reason="libtpu is not installed: the TPU compiler is not here")
    assert said in refused("compile", recipe, *args)


@pytest.mark.parametrize(
    ("recipe", "work"),
    [
        ("llava15-7b-cc12m", flops.Work(4, 256, 1, 576, 640, 64, True)),
        ("siglip-qwen25-cc12m", flops.Work(4, 256, 1, 729, 768, 40, True)),
        ("colab-small", flops.Work(3, 32, 1, 16, 28, 12, False)),
    ],
)
def test_shipped_recipes_by_their_shapes(recipe, work):
    args = [str(ROOT / "train" / f"{recipe}.yaml"), "--tpu", str(V5E4)]
    config = job.configs.parse(job.CompileConfig, args, "compile")
    sizes = job.shapes.experts(config, 0)
    step = job.shapes.described(config.model, config.data, config.training, sizes)
    assert step.work == work
    parameters = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(step.frozen["language"]))
    published = {"llava15-7b-cc12m": 6_738_415_616, "siglip-qwen25-cc12m": 1_543_714_304, "colab-small": 134_515_008}
    assert parameters == published[recipe]  # as the models' cards count them


@pytest.mark.parametrize(("features", "image"), [("cache", 0), ("online", 0.70e9)])
def test_an_encoder_inside_the_step_is_in_the_minimum(features, image):
    """EfficientNet-Lite0, which is no vision transformer."""
    args = [str(ROOT / "train" / "colab-small.yaml"), "--tpu", str(V5E4), "--data.features", features]
    config = job.configs.parse(job.CompileConfig, args, "compile")
    step = job.shapes.described(config.model, config.data, config.training, (3, 32))
    assert step.minimum().vision == pytest.approx(3 * 32 * image, rel=0.01)
