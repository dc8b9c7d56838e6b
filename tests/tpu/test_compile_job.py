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

    assert memory["fits"] and 0 < memory["bytes"] < memory["limit"] == 16 * 2**30 == memory["hbm_bytes"]
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
def test_a_step_that_does_not_fit_says_by_how_much(tpu, recipe, capsys):
    big = ("--data.max-caption", "20001", "--training.batch", "64", "--training.loss-chunk", "20001")
    args = [str(recipe), "--tpu", str(V5E4), "--json", "-", *big]
    cli.main(["compile", *args])
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    assert not memory["fits"] and memory["over"] == memory["bytes"] - memory["limit"] > 0
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


def test_a_sweep_compiles_the_most_promising_and_prints_the_best(recipe, monkeypatch, capsys):
    """The compiler's place is taken by a table: what needs more than a sample at once does not fit."""
    tried = []

    def compiled(step, mesh, hbm_bytes, flags):
        tried.append((dict(mesh.shape), step.training.remat, step.training.device_batch))
        fits = step.training.device_batch <= 2
        program = hlo.parse("ENTRY %e (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4] parameter(0)\n}")
        return ahead.Compiled(ahead.Memory(fits, 2**30 if fits else 2**35, 2**34), 1.0, program if fits else None, None)

    def reported(step, where, mesh, done, captions):
        line = {"samples_per_second": step.training.device_batch, "step_seconds": 1, "mfu": 0.5}
        given = dict(samples_per_expert=1, remat=step.training.remat, device_batch=step.training.device_batch)
        return {"memory": done.memory._asdict(), "roofline": line if done.program else None, "step": given}

    monkeypatch.setattr(ahead, "compiled", compiled)
    monkeypatch.setattr(topology.Slice, "devices", lambda self: jax.devices()[:1] * 4)
    monkeypatch.setattr(parallel, "make_mesh", lambda config, *_: _Mesh(config))
    monkeypatch.setattr(job.report, "report", reported)
    monkeypatch.setattr(job.report, "table", lambda values: values["flags"])
    cli.main(["compile", str(recipe), "--tpu", str(V5E4), "--sweep", "--sweep-limit", "100"])
    out = capsys.readouterr().out
    assert len(tried) == len({json.dumps(one) for one in tried}) > 5
    best = out.splitlines()[-1]
    assert "--training.device-batch 2" in best and "--mesh.fsdp" in best


class _Mesh:
    def __init__(self, config):
        self.shape = {"expert": config.expert, "data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}


def test_the_rough_model_prefers_what_fits_and_is_fast(recipe):
    config = job.configs.parse(job.CompileConfig, [str(recipe), "--tpu", str(V5E4)], "compile")
    where = topology.load(V5E4)
    step = job.shapes.described(config.model, config.data, config.training, (2, 16))
    found = estimate.candidates(step, where, (16, 32))
    assert found == sorted(found, key=lambda one: (one.bytes > where.hbm_bytes, one.seconds, one.bytes))
    assert {one.samples for one in found} == {16, 32}
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
