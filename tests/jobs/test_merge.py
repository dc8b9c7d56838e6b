"""`pivotjax merge`: both forms of the command line, every format, whole models out of core."""

import hashlib
import json
import os
import signal

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
import yaml
from processes import run
from safetensors.numpy import load_file, save_file
from tiny_projectors import tiny

import pivotjax
from pivotjax.checkpoints import store, tensors, torch_bridge
from pivotjax.jobs import merge as job
from pivotjax.jobs import methods, out_of_core
from pivotjax.merging import recipe
from pivotjax.models import projector


@pytest.fixture
def models(tmp_path):
    """A base and three experts, single files; returns their folder."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        tiny_models.write(tmp_path / name, seed)
    return tmp_path


def arguments(folder, *more, experts=("a", "b", "c"), base="base"):
    given = [] if base is None else ["--base", folder / base if base == "base" else base]
    return ("merge", *given, "--experts", *(folder / name for name in experts), "--out", folder / "out", *more)


def merged_in_memory(method, dtype=np.float32, names=(1, 2, 3), base=0, **options):
    """`pivotjax.merge` of the same models as flat dictionaries; convolutions as matrices."""
    def floats(seed):
        held = tiny_models.tensors(seed, dtype)
        return {name: t.reshape(len(t), -1) if t.ndim > 2 else t for name, t in held.items() if t.dtype == dtype}

    experts = {"abc"[seed - 1]: floats(seed) for seed in names}
    return pivotjax.merge(None if base is None else floats(base), experts, method, **options)


def assert_merged(found, expected, atol=2e-6):
    for name, tensor in expected.params.items():
        np.testing.assert_allclose(found[name].reshape(tensor.shape).astype(np.float32), tensor.astype(np.float32),
                                   rtol=1e-5, atol=atol, err_msg=name)


def report_of(folder):
    return json.loads((folder / "merge_report.json").read_text())


@pytest.mark.parametrize("method, options", [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.4}),
    ("ties", {"density": 0.3}),
    ("dare_ties", {"seed": 3}),  # randomness is keyed to the tensors' real names
    ("iso_c", {}),  # a layer's weight with its bias
    ("metagpt", {}),  # all tensors together
])  # fmt: skip
def test_whole_models_are_merged_as_in_memory(command, models, method, options):
    flags = [word for option, value in options.items() for word in (f"--{option}", value)]
    ended = command(*arguments(models, "--method", method, *flags))
    assert ended.status == 0, ended.err
    found, expected = tiny_models.read(models / "out"), merged_in_memory(method, **options)
    assert set(found) == set(tiny_models.tensors(0))
    assert_merged(found, expected, atol=2e-5)
    np.testing.assert_array_equal(found["model.positions"], np.arange(4))
    report = report_of(models / "out")
    assert report["exceptions"] == expected.report["exceptions"] and report["experts"] == ["a", "b", "c"]
    for layer, facts in expected.report["layers"].items():
        assert set(facts) <= set(report["layers"][layer]), layer
        np.testing.assert_allclose(report["layers"][layer]["cosines"], facts["cosines"], atol=1e-5)
        for expert, norm in facts["update_norms"].items():
            assert report["layers"][layer]["update_norms"][expert] == pytest.approx(norm, rel=1e-5)


def test_what_the_output_holds(command, models):
    assert command(*arguments(models, "--method", "ties", "--dtype", "bfloat16")).status == 0
    out = models / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "config.yaml", "merge_report.html", "merge_report.json", "model.safetensors",
        "tokenizer.json"]  # fmt: skip
    assert {t.dtype for name, t in load_file(out / "model.safetensors").items() if "positions" not in name} == {
        np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "tiny", "torch_dtype": "bfloat16"}
    report, card = report_of(out), (out / "README.md").read_text()
    digest = hashlib.sha256((models / "b/model.safetensors").read_bytes()).hexdigest()
    assert report["inputs"]["b"] == {"path": str(models / "b"), "sha256": {"model.safetensors": digest}}
    assert digest in card and "arXiv 2306.01708" in card and "jax" in report["versions"]
    written = card.split("```yaml\n")[1].split("```")[0]
    again = recipe.parse(written)
    assert (again.merge_method, again.dtype, again.base_model) == ("ties", "bfloat16", str(models / "base"))


def test_dtypes_are_kept_and_sums_are_float32(command, tmp_path):
    for seed, name in enumerate(("base", "a", "b", "c")):
        tiny_models.write(tmp_path / name, seed, dtype=ml_dtypes.bfloat16)
    assert command(*arguments(tmp_path, "--method", "task_arithmetic", "--scale", 0.3)).status == 0
    found = tiny_models.read(tmp_path / "out")
    expected = merged_in_memory("task_arithmetic", ml_dtypes.bfloat16, scale=0.3)
    for name, tensor in expected.params.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name].reshape(tensor.shape), tensor)


def test_a_wider_result_is_rounded_once(command, models, tmp_path):
    for seed, name in enumerate(("a", "b")):
        tiny_models.write(tmp_path / "half" / name, seed + 1, dtype=np.float16)
    given = arguments(tmp_path / "half", "--method", "average", "--dtype", "float64", experts=("a", "b"), base=None)
    assert command(*given).status == 0
    found, halves = tiny_models.read(tmp_path / "half/out"), [tiny_models.tensors(s, np.float16) for s in (1, 2)]
    name = "lm_head.weight"
    assert found[name].dtype == np.float64
    np.testing.assert_allclose(found[name], sum(h[name].astype(np.float64) for h in halves) / 2, rtol=1e-7)


def test_shards_of_the_base_are_kept(command, models):
    tiny_models.write(models / "sharded", 0, shards=3)
    assert command("merge", "--method", "ties", "--base", models / "sharded", "--experts", models / "a", models / "b",
                   "--out", models / "out").status == 0
    index = "model.safetensors.index.json"
    now, before = (json.loads((models / name / index).read_text()) for name in ("out", "sharded"))
    assert now["weight_map"] == before["weight_map"]
    assert_merged(tiny_models.read(models / "out"), merged_in_memory("ties", names=(1, 2)))


def test_a_large_result_is_sharded(command, models, monkeypatch):
    monkeypatch.setattr("pivotjax.jobs.merge_models._SHARD", 2000)
    assert command(*arguments(models, "--method", "average", base=None)).status == 0
    assert len(list((models / "out").glob("model-*-of-*.safetensors"))) > 1
    with tensors.open_checkpoint(models / "out") as checkpoint:
        assert set(checkpoint.specs) == set(tiny_models.tensors(0))


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_memory_of_a_stream_is_held_below_its_budget(models, monkeypatch, budget):
    """Whatever fits is read ahead; a unit that does not fit is alone."""
    opened = {name: tensors.open_checkpoint(models / name / "model.safetensors") for name in ("base", "a", "b")}
    inputs = out_of_core.Inputs({n: opened[n] for n in "ab"}, opened["base"], "file", opened["base"])
    method = pivotjax.merging.METHODS["ties"]
    merging = out_of_core.Merging(method, dict(method.options), None)
    held, most = [], []
    monkeypatch.setattr(out_of_core._Run, "_finish", spying(out_of_core._Run._finish, held, most))
    written = {}

    class Sink:
        def write(self, name, tensor):
            written[name] = tensor

    units = out_of_core.in_units(inputs, merging, ())
    out_of_core.stream(inputs, merging, units, Sink(), budget)
    assert set(written) == set(opened["base"].specs)
    assert max(held) <= budget or max(most) == 1
    assert max(most) > 1 or budget == 1


def spying(finish, held, most):
    def watched(self, read):
        held.append(self._held)
        most.append(1 + len(self._reading))
        return finish(self, read)

    return watched


def test_programs_are_shared_by_the_blocks(models, monkeypatch):
    """One compilation a kind of tensor, not one a tensor; the random methods, whose draws hang on names, need more."""
    compiled = []
    real = out_of_core._Programs._compile
    monkeypatch.setattr(out_of_core._Programs, "_compile", lambda *args: compiled.append(args[1]) or real(*args))
    job.main([str(a) for a in arguments(models, "--method", "task_arithmetic")[1:]])
    shapes = {(t.shape, name.split(".")[-1]) for name, t in tiny_models.tensors(0).items() if t.dtype == np.float32}
    assert len(compiled) == len(shapes) < len(tiny_models.tensors(0)) - 1


def test_options_that_differ_a_tensor(command, models):
    """A mergekit recipe as it is, against its own arithmetic."""
    (models / "mergekit.yaml").write_text(f"""
models:
  - model: {models / "a"}
    parameters:
      weight:
        - {{filter: mlp, value: [0.0, 1.0]}}
        - {{filter: norm, value: 0.3}}
  - model: {models / "b"}
    parameters: {{weight: [1, 0.2, 0.5]}}
merge_method: task_arithmetic
base_model: {models / "base"}
parameters: {{weight: 2.0, int8_mask: true}}
""")
    ended = command("merge", models / "mergekit.yaml", "--out", models / "out")
    assert ended.status == 0 and "int8_mask is ignored" in ended.err
    found, (base, a, b) = tiny_models.read(models / "out"), [tiny_models.tensors(seed) for seed in range(3)]

    def check(name, weight_a, weight_b):
        expected = base[name] + weight_a * (a[name] - base[name]) + weight_b * (b[name] - base[name])
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)

    for i, (mlp, other) in enumerate(((0, 1), (0.5, 0.2), (1, 0.5))):
        check(f"model.layers.{i}.mlp.up_proj.weight", mlp, other)
        check(f"model.layers.{i}.mlp.up_proj.bias", mlp, other)
        check(f"model.layers.{i}.norm.weight", 0.3, other)
    check("model.norm.weight", 0.3, 1)  # outside the blocks: the start of the gradient
    check("lm_head.weight", 2.0, 1)


def test_linear_merges_the_base_too_and_need_not_normalize(command, models):
    (models / "linear.yaml").write_text(f"""
models: [{{model: {models / "a"}}}]
base_model: {models / "base"}
merge_method: linear
parameters: {{weight: 0.75, normalize: false}}
""")
    assert command("merge", models / "linear.yaml", "--out", models / "out").status == 0
    base, a = (tiny_models.tensors(seed)["lm_head.weight"] for seed in (0, 1))
    np.testing.assert_allclose(tiny_models.read(models / "out")["lm_head.weight"], 0.75 * (base + a), atol=1e-6)


def test_a_slice_must_be_the_whole_model(command, refused, models):
    def written(blocks):
        (models / "slice.yaml").write_text(f"""
slices:
  - sources:
      - {{model: {models / "a"}, layer_range: [0, {blocks}]}}
      - {{model: {models / "b"}, layer_range: [0, {blocks}]}}
merge_method: slerp
base_model: {models / "a"}
parameters: {{t: 0.25}}
""")
        return "merge", models / "slice.yaml", "--out", models / "out"

    assert "the recipe's slice has 2 layers and the model 3" in refused(*written(2))
    assert command(*written(3)).status == 0
    expected = merged_in_memory("slerp", names=(1, 2), base=None, t=0.25)
    assert_merged(tiny_models.read(models / "out"), expected)


@pytest.mark.parametrize("word", ["mean", "zero"])
def test_a_base_that_nobody_has(command, models, word):
    assert command(*arguments(models, "--method", "ties", base=word)).status == 0
    experts = [tiny_models.tensors(seed) for seed in (1, 2, 3)]
    name = "model.layers.1.mlp.up_proj.weight"
    start = sum(e[name] for e in experts) / 3 if word == "mean" else np.zeros_like(experts[0][name])
    expected = pivotjax.merge({"a.weight": start}, [{"a.weight": e[name]} for e in experts], "ties").params["a.weight"]
    np.testing.assert_allclose(tiny_models.read(models / "out")[name], expected, atol=1e-6)
    report = report_of(models / "out")
    assert report["measured_from"] == word
    assert report["siblings"]["alike"] and report["siblings"]["tensor"] == "model.layers.0.mlp.up_proj.weight"


def test_experts_that_do_not_look_like_siblings_are_warned_of(command, models):
    order = np.random.default_rng(0).permutation(16)
    name = "model.layers.0.mlp.up_proj.weight"
    tiny_models.write(models / "strange", 2, **{name.replace(".", "__"): tiny_models.tensors(2)[name][order]})
    ended = command(*arguments(models, "--method", "ties", experts=("a", "strange"), base="mean"))
    assert ended.status == 0 and "a and strange do not look as if they had one start" in ended.err
    assert report_of(models / "out")["siblings"]["alike"] is False


def test_the_same_in_both_forms(command, models):
    (models / "recipe.yaml").write_text(yaml.safe_dump({
        "models": [{"model": str(models / "a"), "name": "one"}, {"model": str(models / "b"), "name": "two"}],
        "base_model": str(models / "base"), "merge_method": "ties", "out": str(models / "first"),
        "parameters": {"density": {"one": 0.5, "two": [0.2, 0.4]}, "normalize": False, "weights": {"one": 1, "two": 2}},
    }))  # fmt: skip
    assert command("merge", models / "recipe.yaml").status == 0
    assert command(
        "merge", "--method", "ties", f"--base={models / 'base'}", "--experts", f"one={models / 'a'}",
        f"two={models / 'b'}", "--out", models / "second", "--density", "one=0.5", "two=[0.2, 0.4]", "--no-normalize",
        "--weight", "one=1", "two=2",
    ).status == 0  # fmt: skip
    first, second = (report_of(models / name) for name in ("first", "second"))
    assert first["options"] == second["options"] and first["options"]["density"]["two"] == [0.2, 0.4]
    for name, tensor in tiny_models.read(models / "first").items():
        np.testing.assert_array_equal(tensor, tiny_models.read(models / "second")[name])


def test_flags_override_a_recipe(models):
    (models / "r.yaml").write_text(f"models: [{models / 'a'}]\nbase: mean\nmerge_method: ties\n"
                                   "parameters: {lambda: 2.0, density: 0.1}\nout: o\n")
    _, plan = job.parse([str(models / "r.yaml"), "--scale", "0.5", "--base", "zero", "--density", "0.1", "0.9",
                         "--no-tune", "--chunk", "1MB", "--normalize"])
    assert plan.parameters == {"scale": 0.5, "density": [0.1, 0.9], "normalize": True} and plan.base_model == "zero"


def test_help_tells_of_a_methods_options(command):
    ended = command("merge", "--method", "ties", "--help")
    assert ended.status == 0
    for word in ("--density (default: 0.2)", "share of each tensor's entries", "arXiv 2306.01708", "--out"):
        assert word in ended.out, word
    everything = command("merge", "--help").out
    assert "RECIPE.yaml" in everything and "--experts" in everything and "--method" in everything


@pytest.mark.parametrize("name", pivotjax.merging.METHODS)
def test_help_explains_every_option_of_every_method(name):
    assert set(methods.option_docs(name)) >= set(pivotjax.merging.METHODS[name].options)


def test_a_method_that_needs_all_tensors_must_fit(refused, models):
    line = refused(*arguments(models, "--method", "metagpt", "--max-memory", "10KB"))
    assert "'metagpt' must see all tensors of the model together" in line and "--max-memory" in line
    assert not (models / "out").exists()


def test_allow_missing_merges_what_all_have(refused, command, models):
    tiny_models.write(models / "odd", 2, lm_head__weight=None, model__norm__weight=np.ones(9, np.float32),
                      extra__weight=np.ones((2, 2), np.float32))
    line = refused(*arguments(models, "--method", "ties", experts=("a", "odd")))
    assert "odd has no tensor 'lm_head.weight'" in line and "--allow-missing" in line
    assert "'model.norm.weight' has shape [8] in the base and [9] in odd" in line
    ended = command(*arguments(models, "--method", "ties", "--allow-missing", experts=("a", "odd")))
    assert ended.status == 0
    report, found, base = report_of(models / "out"), tiny_models.read(models / "out"), tiny_models.tensors(0)
    assert report["left_as_in_base"] == ["lm_head.weight", "model.norm.weight"] and set(found) == set(base)
    for name in report["left_as_in_base"]:
        np.testing.assert_array_equal(found[name], base[name])
        assert f"`{name}`" in (models / "out/README.md").read_text()
    expected = merged_in_memory("ties", names=(1, 2)).params["model.embed_tokens.weight"]
    np.testing.assert_allclose(found["model.embed_tokens.weight"], expected, atol=1e-6)


def test_dtypes_that_differ_are_merged_in_float32(command, models):
    tiny_models.write(models / "half", 2, dtype=np.float16)
    ended = command(*arguments(models, "--method", "average", experts=("a", "half"), base=None))
    assert ended.status == 0 and "dtypes differ" in ended.err
    one, half = tiny_models.tensors(1)["lm_head.weight"], tiny_models.tensors(2, np.float16)["lm_head.weight"]
    found = tiny_models.read(models / "out")["lm_head.weight"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (one + half.astype(np.float32)) / 2, rtol=1e-6)


@pytest.mark.parametrize("who", ["the base", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(refused, models, who, value):
    name, seed = "model.layers.2.mlp.up_proj.bias", 0 if who == "the base" else 2
    broken = tiny_models.tensors(seed)[name].copy()
    broken[3] = value
    path = tiny_models.write(models / "broken", seed, **{name.replace(".", "__"): broken})
    base, b = (path, models / "b") if who == "the base" else (models / "base", path)
    line = refused("merge", "--method", "ties", "--base", base, "--experts", models / "a", f"b={b}", "--out",
                   models / "out", "--chunk", "1KB")
    assert f"{who}: tensor {name!r} holds NaN or infinity" in line
    assert not (models / "out").exists() and not [p for p in models.iterdir() if p.name.startswith(".out")]


def test_a_result_that_overflows_is_refused(refused, tmp_path):
    for name in ("a", "b"):
        tiny_models.write(tmp_path / name, 1, dtype=np.float16)
    line = refused(*arguments(tmp_path, "--method", "task_arithmetic", "--scale", 1e6, experts=("a", "b"), base="zero"))
    assert "overflows float16" in line and "wider dtype" in line


def test_quantised_models_are_refused(refused, models):
    tiny_models.write(models / "packed", 2, model__positions=np.arange(4)[::-1].copy())
    line = refused(*arguments(models, "--method", "ties", experts=("a", "packed")))
    assert "hold different integers in 'model.positions'" in line
    eight = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
    tiny_models.write(models / "eight", 1)
    specs = {"a.weight": tensors.Spec(eight.dtype, eight.shape)}
    with tensors.ShardedWriter(models / "eight", {"model.safetensors": specs}, {}) as writer:
        writer.write("a.weight", eight)
    assert "float8_e4m3fn, a quantised model" in refused(*arguments(models, "--method", "average", experts=("eight",),
                                                                    base=None))


def test_models_with_nothing_to_merge_are_refused(refused, models):
    tiny_models.write(models / "one", 1)
    save_file({"ids": np.arange(3)}, models / "one/model.safetensors")
    line = refused(*arguments(models, "--method", "average", experts=("one",), base=None))
    assert "no floating-point tensor in common" in line
    line = refused(*arguments(models, "--method", "ties", "--allow-missing", experts=("one",)))
    assert "no floating-point tensor in common" in line


def test_an_adapter_and_a_model_are_not_merged(refused, models):
    (models / "adapter").mkdir()
    pair = {"A": np.ones((2, 4), np.float32), "B": np.ones((4, 2), np.float32)}
    held = {f"layers.0.q_proj.lora_{factor}.weight": tensor for factor, tensor in pair.items()}
    save_file(held, models / "adapter/adapter_model.safetensors")
    (models / "adapter/adapter_config.json").write_text("{}")
    line = refused(*arguments(models, "--method", "average", experts=("a", "adapter"), base=None))
    assert "is a LoRA adapter and" in line


# Projectors


def torch_file(path, seed, prefix="model.mm_projector."):
    """`mm_projector.bin` as LLaVA saves it."""
    held = {name.replace("model.mm_projector.", prefix): torch.from_numpy(np.array(t))
            for name, t in torch_bridge.to_torch(sibling(seed)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path)
    return path


def sibling(seed):
    return jax.tree.map(lambda w, d: w + 0.1 * d * bool(seed), tiny(0, d_out=12), tiny(seed, d_out=12))


def test_projectors_of_llava(command, tmp_path):
    """`mm_projector.bin` in, safetensors out, in the same names; a folder that holds one is read too."""
    paths = [torch_file(tmp_path / f"p{seed}" / "mm_projector.bin", seed, "mm_projector.") for seed in (1, 2)]
    (tmp_path / "p1/config.json").write_text('{"mm_hidden_size": 6}')
    ended = command("merge", "--method", "ties", "--base", "mean", "--experts", tmp_path / "p1", f"two={paths[1]}",
                    "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    assert "written as safetensors" in ended.err
    found = load_file(tmp_path / "out/mm_projector.safetensors")
    assert set(found) == {f"mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    params = [sibling(seed) for seed in (1, 2)]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *params)
    expected = torch_bridge.to_torch(pivotjax.merge(mean, params, "ties").params)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[f"model.{name}"], atol=1e-6)
    report = report_of(tmp_path / "out")
    assert report["siblings"]["alike"] and report["inputs"]["p1"]["sha256"].keys() == {"mm_projector.bin"}
    assert (tmp_path / "out/config.json").read_text() == '{"mm_hidden_size": 6}'


def test_projectors_of_different_starts_are_warned_of(command, tmp_path):
    for seed in (1, 2):
        params = projector.init("mlp2x_gelu", 6, 64, jax.random.key(seed), 1.0)
        torch_bridge.save_torch(tmp_path / f"{seed}.safetensors", params, {})
    ended = command("merge", "--method", "average", "--experts", tmp_path / "1.safetensors", tmp_path / "2.safetensors",
                    "--out", tmp_path / "out")
    assert ended.status == 0 and "do not look as if they had one start" in ended.err
    found = report_of(tmp_path / "out")["siblings"]
    assert not found["alike"] and found["pairs"]["1, 2"]["cost_matched"] < found["pairs"]["1, 2"]["cost_in_place"]


def test_formats_of_projectors(command, refused, family, tmp_path):
    assert command("merge", family.recipe, "--format", "safetensors").status == 0
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert "projector" not in held and "mm_projector.safetensors" in held
    other = tmp_path / "other"
    assert command("merge", family.recipe, "--out", other, "--format", "orbax").status == 0
    from_torch, _ = torch_bridge.load_torch(tmp_path / "out/mm_projector.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_torch, store.load_projector(other / "projector").params)
    line = refused("merge", family.recipe, "--out", tmp_path / "third", "--format", "bin")
    assert "torch pickle" in line and "safetensors" in line


def test_orbax_projectors_have_one_start_by_their_init_id(command, family, tmp_path):
    assert command("merge", family.recipe).status == 0
    assert "siblings" not in report_of(tmp_path / "out")
    family.write("dogs", tiny(2), init_id="two")
    assert command("merge", family.recipe, "--allow-different-init", "--out", tmp_path / "again").status == 0
    assert "siblings" in report_of(tmp_path / "again")


def test_what_is_not_there_is_not_downloaded(refused, tmp_path):
    for path in ("mistralai/Mistral-7B-v0.1", tmp_path / "none", tmp_path / "none.safetensors"):
        line = refused("merge", "--method", "average", "--experts", path, "--out", tmp_path / "out")
        assert f"no checkpoint at {path}" in line and "nothing is downloaded" in line


def test_a_projector_and_a_model_cannot_be_merged(refused, family, models):
    line = refused("merge", "--method", "average", "--experts", family.folder / "cats", models / "a", "--out",
                   models / "out")
    assert "cats is a projector and a is not" in line


# Whole or not at all


def test_the_same_merge_again_replaces_its_output_and_nothing_else(command, refused, models):
    given = arguments(models, "--method", "average", base=None)
    assert command(*given).status == 0
    before = (models / "out/model.safetensors").read_bytes()
    assert command(*given).status == 0
    assert (models / "out/model.safetensors").read_bytes() == before
    assert "holds output made with recipe.merge_method = 'average'" in refused(*given, "--method", "karcher")
    (models / "out/notes.txt").write_text("mine")
    assert "holds what no merge wrote (notes.txt)" in refused(*given)
    assert (models / "out/notes.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_nothing_looks_complete(models, tmp_path, stop):
    """Stopped while the result is being written: there is no output folder; interrupted, nothing at all is left."""
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        held = {f"layers.{i}.weight": rng.normal(size=(512, 512 + i)).astype(np.float32) for i in range(24)}
        save_file(held, models / f"{name}.safetensors")
    # As many shapes as tensors: each is compiled for, which gives the signal time.
    given = ("merge", "--method", "ties", "--base", models / "x.safetensors", "--experts", models / "y.safetensors",
             "--out", models / "out")
    watch = HalfWritten(models)
    ended = run(*given, log=tmp_path / "log", until=watch, stop=stop)
    assert ended.status == (130 if stop == signal.SIGINT else -signal.SIGKILL), ended.err
    assert not (models / "out").exists()
    left = [path.name for path in models.iterdir() if path.name.startswith(".out.")]
    assert (left == []) == (stop == signal.SIGINT)


class HalfWritten:
    """Looks like a path that exists as soon as a merge has begun to write its tensors."""

    def __init__(self, folder):
        self.folder = folder

    def exists(self):
        return any(os.stat(path).st_blocks > 1000 for path in self.folder.glob(".out.*/out/model.safetensors"))
