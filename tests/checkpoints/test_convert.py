"""`pivotjax convert`: nothing is lost on any way and back, and transformers and torch read what is written."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folders as tiny
import torch
import transformers as hf
from etils import epath
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file

from pivotjax.checkpoints import hub, model_store, moving, names, pickles, store, tensors, torch_bridge
from pivotjax.models import language, multimodal, projector, vision
from pivotjax.models.multimodal import load_model

FAMILIES = {
    **{f"text: {name}": (lambda name=name, **new: tiny.text(name, **new)) for name in tiny.TEXTS},
    **{f"tower: {name}": (lambda name=name, **new: tiny.tower(name, **new)) for name in tiny.TOWERS},
    **{f"whole: {name}": (lambda name=name, **new: tiny.whole(name, **new)) for name in tiny.WHOLE},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("whole: llava")`: the folder that transformers saved; each made once."""
    made = {}

    def of(name, **new):
        key = (name, *new.items())
        if key not in made:
            made[key] = tiny.save(FAMILIES[name](**new), tmp_path_factory.mktemp("saved") / "model")
        return made[key]

    return of


def held(folder):
    """All tensors of a folder; towers as every version of transformers reads them (5 writes no `vision_model.`)."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_torch_file(file).items():
            name = re.sub(r"^((?:vision_tower\.)?)(?=embeddings|pre_layrnorm|encoder|post_layernorm|head)",
                          r"\1vision_model.", name)  # fmt: skip
            found[name] = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_family_is_here():
    """Whole CLIPs and SigLIPs are read for their tower alone; the towers of Idefics3 and SmolVLM live in those."""
    tried = {FAMILIES[name]().config.model_type for name in FAMILIES}
    known = {*language.FAMILIES, *vision.FAMILIES, *multimodal.FAMILIES}
    assert known - tried == {"clip", "siglip", "siglip2", "idefics3_vision", "smolvlm_vision"}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bitwise_the_same(saved, done, tmp_path, name):
    done("convert", saved(name), tmp_path / "orbax")
    done("convert", tmp_path / "orbax", tmp_path / "back", "--shard-size", "2KB")
    assert held(tmp_path / "back") == held(saved(name))
    assert config(tmp_path / "back") == config(saved(name))
    small = {path.name: path.read_bytes() for path in saved(name).iterdir() if path.suffix == ".json"}
    index = "model.safetensors.index.json"
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").glob("*.json") if path.name != index} == small
    shards = [path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")]
    assert len(shards) > 1 and (tmp_path / "back" / index).exists()


@pytest.mark.parametrize("name", ["text: qwen3", "tower: clip", "whole: llava", "whole: smolvlm"])
def test_transformers_loads_what_is_written(saved, done, tmp_path, name):
    done("convert", saved(name), tmp_path / "orbax")
    done("convert", tmp_path / "orbax", tmp_path / "back")
    original = FAMILIES[name]()
    loaded, report = type(original).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = original.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_kinds_of_files_are_read(done, tmp_path, kind, dtype):
    model, folder = tiny.whole("llava", dtype=dtype), tmp_path / "hf"
    tiny.save(model, folder, **{"max_shard_size": "2KB"} if kind == "sharded safetensors" else {})
    expected = held(folder)
    if "bin" in kind:
        state = load_torch_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = list(state)
        parts = [names[::2], names[1::2]] if kind == "sharded bin" else [names]
        where = {}
        for i, part in enumerate(parts, 1):
            file = "pytorch_model.bin" if len(parts) == 1 else f"pytorch_model-{i:05d}-of-{len(parts):05d}.bin"
            torch.save({key: state[key] for key in part}, folder / file)
            where |= dict.fromkeys(part, file)
        if len(parts) > 1:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    done("convert", folder, tmp_path / "orbax")
    done("convert", tmp_path / "orbax", tmp_path / "back")
    assert held(tmp_path / "back") == expected


def test_an_orbax_checkpoint_is_a_plain_tree_for_orbax(saved, done, tmp_path):
    from orbax.checkpoint import v1 as ocp

    done("convert", saved("whole: llava"), tmp_path / "o")
    tree = ocp.load(tmp_path / "o")
    state = load_file(saved("whole: llava") / "model.safetensors")
    expected = state["language_model.model.layers.1.self_attn.q_proj.weight"].T
    np.testing.assert_array_equal(tree["language"]["layers"]["1"]["q"]["kernel"], expected)
    said = ocp.metadata(tmp_path / "o").custom_metadata
    assert (said["kind"], said["family"], said["format"]) == ("model", "llava", 1)
    assert said["config"] == config(saved("whole: llava"))


@pytest.mark.parametrize("name", ["whole: llava", "whole: llava_next", "whole: idefics3", "text: phi3"])
def test_load_model_reads_orbax_as_it_reads_the_folder(saved, done, tmp_path, name):
    done("convert", saved(name), tmp_path / "o")
    assert multimodal.is_model(tmp_path / "o")
    ours, theirs = load_model(tmp_path / "o"), load_model(saved(name))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert (ours.config, ours.stop, ours.pad_token) == (theirs.config, theirs.stop, theirs.pad_token)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_dtype_casts_floats_and_says_so(saved, done, tmp_path, to):
    done("convert", saved("whole: llava"), tmp_path / "out", "--to", to, "--dtype", "bfloat16")
    if to == "orbax":
        done("convert", tmp_path / "out", tmp_path / "hf")
    folder = tmp_path / ("hf" if to == "orbax" else "out")
    expected = json.dumps(config(saved("whole: llava")))
    assert json.dumps(config(folder)) == expected.replace('"dtype": "float32"', '"dtype": "bfloat16"') != expected
    found, before = (load_torch_file(one / "model.safetensors") for one in (folder, saved("whole: llava")))
    key = "language_model.model.embed_tokens.weight"
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert torch.equal(found[key], before[key].to(torch.bfloat16))


# The LLaVA repository's layout.


def named(folder):
    return {name: data for name, (_, _, data) in held(folder).items()}


@pytest.mark.parametrize("name", ["whole: llava", "whole: llava siglip", "whole: llava_next"])
def test_to_the_layout_of_the_llava_repository_and_back(saved, done, tmp_path, name):
    source = saved(name)
    done("convert", source, tmp_path / "vision", "--part", "vision", "--to", "hf")
    done("convert", source, tmp_path / "llava", "--to", "llava", "--vision", "openai/some-tower", "--bin")
    before, after = load_torch_file(source / "model.safetensors"), load_torch_file(tmp_path / "llava/model.safetensors")
    assert len(after) == len(before)
    assert torch.equal(after["model.mm_projector.2.weight"], before["multi_modal_projector.linear_2.weight"])
    layer = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[layer], before[f"language_model.{layer}"])
    assert any(key.startswith("model.vision_tower.vision_tower.vision_model.") for key in after)
    rows = tiny.WORDS  # the image token and the padding go, as transformers' conversion adds them
    assert torch.equal(after["lm_head.weight"], before["language_model.lm_head.weight"][:rows])
    fields = config(tmp_path / "llava")
    assert fields["mm_vision_tower"] == "openai/some-tower" and fields["unfreeze_mm_vision_tower"] is True
    loaded = torch.load(tmp_path / "llava/mm_projector.bin", weights_only=True)
    assert all(torch.equal(tensor, after[key]) for key, tensor in loaded.items()) and len(loaded) == 4

    done("convert", tmp_path / "llava", tmp_path / "orbax", "--vision", tmp_path / "vision")
    done("convert", tmp_path / "orbax", tmp_path / "hf")
    done("convert", tmp_path / "orbax", tmp_path / "llava2", "--to", "llava")  # the tower's name is remembered
    assert named(tmp_path / "llava2") == named(tmp_path / "llava")
    assert config(tmp_path / "llava2") == config(tmp_path / "llava")
    back = load_torch_file(tmp_path / "hf/model.safetensors")
    for key, tensor in load_torch_file(source / "model.safetensors").items():
        key = re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key)
        same = min(len(tensor), rows) if "embed_tokens" in key or "lm_head" in key else len(tensor)
        assert torch.equal(back[key][:same], tensor[:same]), key
    assert config(tmp_path / "hf")["text_config"]["vocab_size"] == 64


def test_a_tower_outside_an_original_checkpoint(saved, done, refused, tmp_path):
    source = saved("whole: llava")
    done("convert", source, tmp_path / "vision", "--part", "vision", "--to", "hf")
    done("convert", source, tmp_path / "llava", "--to", "llava", "--vision", "openai/some-tower")
    state = load_torch_file(tmp_path / "llava/model.safetensors")
    torch.save({key: v for key, v in state.items() if "vision_tower" not in key}, tmp_path / "llava/pytorch_model.bin")
    (tmp_path / "llava/model.safetensors").unlink()
    assert "names its vision tower 'openai/some-tower'" in refused("convert", tmp_path / "llava", tmp_path / "o")
    done("convert", tmp_path / "llava", tmp_path / "hf", "--to", "hf", "--vision", tmp_path / "vision")
    found, expected = named(tmp_path / "hf"), named(source)
    assert found.keys() == expected.keys()
    resized = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    assert all(found[key] == data for key, data in expected.items() if key not in resized)


def test_transformers_takes_a_picture_by_what_came_from_the_llava_repository(saved, done, tmp_path):
    """The tokenizer gets the image token, the processor what the repository does to images."""
    from PIL import Image

    source = saved("whole: llava")
    done("convert", source, tmp_path / "vision", "--part", "vision", "--to", "hf")
    done("convert", source, tmp_path / "llava", "--to", "llava", "--vision", "openai/some-tower")
    fields = config(tmp_path / "llava") | {"image_aspect_ratio": "pad"}
    (tmp_path / "llava/config.json").write_text(json.dumps(fields))
    tokenizer = json.loads((tmp_path / "llava/tokenizer.json").read_text())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<image>"]
    (tmp_path / "llava/tokenizer.json").write_text(json.dumps(tokenizer))
    done("convert", tmp_path / "llava", tmp_path / "o", "--vision", tmp_path / "vision")
    done("convert", tmp_path / "o", tmp_path / "hf")

    for back in ("o", "hf"):  # and the repository's config.json says so again
        done("convert", tmp_path / back, tmp_path / f"llava-{back}", "--to", "llava", "--vision", "openai/some-tower")
        assert config(tmp_path / f"llava-{back}")["image_aspect_ratio"] == "pad"
    assert config(tmp_path / "llava-o") == fields

    processor = hf.LlavaProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 20, 3), np.uint8))
    inputs = processor(images=[picture], text="w3 <image> w5", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [3, 20, 20, 20, 20, 5]
    ours = load_model(tmp_path / "hf")
    prepared = ours.prepare([picture], "w3 <image> w5")
    assert prepared["token_ids"][0].tolist() == inputs["input_ids"][0].tolist()
    np.testing.assert_allclose(prepared["pixel_values"], inputs["pixel_values"].numpy(), atol=1 / 255 / 0.26)
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    found = np.asarray(ours.logits(prepared["token_ids"], inputs["pixel_values"].numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


# Projectors.


def llava_projector(dtype=torch.float16, prefix="model.mm_projector."):
    torch.manual_seed(1)
    shapes = {"0.weight": (16, 12), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    return {f"{prefix}{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_mm_projector_there_and_back(done, tmp_path, dtype, prefix):
    written = llava_projector(dtype, prefix)
    torch.save(written, tmp_path / "mm_projector.bin")
    done("convert", tmp_path / "mm_projector.bin", tmp_path / "orbax")
    assert store.load_projector(tmp_path / "orbax").params["linear_1"]["kernel"].shape == (16, 16)
    done("convert", tmp_path / "orbax", tmp_path / "back/mm_projector.bin")
    done("convert", tmp_path / "back/mm_projector.bin", tmp_path / "p.safetensors")
    done("convert", tmp_path / "p.safetensors", tmp_path / "again", "--to", "llava", "--bin")
    for file in ("back/mm_projector.bin", "again/mm_projector.bin"):
        read = torch.load(tmp_path / file, weights_only=True)
        assert read.keys() == written.keys()
        for name, tensor in written.items():
            assert read[name].dtype == dtype and torch.equal(read[name], tensor)


def test_a_trained_projector_takes_its_place(saved, done, tmp_path):
    """Whichever format it comes in; the rest stays, and taken out again it is the same."""
    params = jax.tree.map(jnp.asarray, projector.init("mlp2x_gelu", 12, 16, jax.random.key(3), 1.0))
    store.save_projector(tmp_path / "p", params, {"name": "merged"})
    torch_bridge.save_torch(tmp_path / "p.safetensors", params, {})
    pickles.write_state_dict(tmp_path / "p.bin", torch_bridge.to_torch(params))
    source = saved("whole: llava")
    for i, given in enumerate(("p", "p.safetensors", "p.bin")):
        out = tmp_path / f"out{i}"
        done("convert", source, out, "--to", "hf", "--projector", tmp_path / given)
        found, before = load_file(out / "model.safetensors"), named(source)
        for key, data in named(out).items():
            assert key.startswith("multi_modal_projector") or data == before[key]
        np.testing.assert_array_equal(
            found["multi_modal_projector.linear_1.weight"], np.asarray(params["linear_0"]["kernel"]).T
        )
        done("convert", out, tmp_path / f"taken{i}", "--part", "projector")
        taken = store.load_projector(tmp_path / f"taken{i}").params
        jax.tree.map(np.testing.assert_array_equal, taken, params)


def test_a_projector_without_biases(saved, done, tmp_path):
    done("convert", saved("whole: smolvlm"), tmp_path / "p", "--part", "projector")
    assert store.load_projector(tmp_path / "p").params.keys() == {"linear_0"}
    done("convert", saved("whole: smolvlm"), tmp_path / "hf", "--to", "hf", "--projector", tmp_path / "p")
    assert held(tmp_path / "hf") == held(saved("whole: smolvlm"))


@pytest.mark.parametrize(("text", "rows"), [("text: llama tied", 24), ("text: qwen3", 24), ("text: qwen3", 20)])
def test_a_projector_and_its_two_models_become_a_llava(saved, done, tmp_path, text, rows):
    params = projector.init("mlp2x_gelu", 12, 16, jax.random.key(3), 1.0)
    model = {"select_layer": -1, "select_features": "patch", "projector": {"kind": "mlp2x_gelu"}}
    store.save_projector(tmp_path / "p", params, {"config": {"model": model}})
    language = saved(text, vocab_size=rows)  # with 20 there is no room for the image token
    parts = ("--vision", saved("tower: clip"), "--language", language)
    done("convert", tmp_path / "p", tmp_path / "hf", *parts)
    done("convert", tmp_path / "p", tmp_path / "o", *parts, "--to", "orbax")
    done("convert", language, tmp_path / "text")  # from an Orbax checkpoint of the language model it is the same
    done("convert", tmp_path / "p", tmp_path / "hf2", *parts[:3], tmp_path / "text")
    assert named(tmp_path / "hf2") == named(tmp_path / "hf")

    model, report = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.vision_feature_layer == -1 and model.config.image_token_id == tiny.WORDS
    assert (tmp_path / "hf/preprocessor_config.json").exists()
    ids = np.array([[1, *[tiny.WORDS] * 4, 5, 6]])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    for folder in ("hf", "o"):
        found = np.asarray(load_model(tmp_path / folder).logits(ids, pixels))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_parts_are_models_of_their_own(saved, done, tmp_path):
    source = saved("whole: llava")
    done("convert", source, tmp_path / "language", "--part", "language", "--to", "hf")
    done("convert", source, tmp_path / "vision", "--part", "vision", "--to", "hf")
    assert not (tmp_path / "language/preprocessor_config.json").exists()
    assert not (tmp_path / "vision/tokenizer.json").exists()
    whole = tiny.whole("llava")
    text = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    tower = hf.CLIPVisionModel.from_pretrained(tmp_path / "vision")
    ids, pixels = torch.tensor([[1, 4, 5]]), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(input_ids=ids).logits)
        theirs = whole.model.vision_tower(pixels).last_hidden_state
        assert torch.equal(tower(pixels).last_hidden_state, theirs)
    assert config(tmp_path / "language")["model_type"] == "llama"


def test_the_tower_of_a_whole_clip(done, refused, tmp_path):
    clip = hf.CLIPModel(hf.CLIPConfig(vision_config=tiny.TOWERS["clip"]()[0].to_dict(), text_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)))  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    assert "--part vision takes the images' one" in refused("convert", tmp_path / "clip", tmp_path / "o")
    done("convert", tmp_path / "clip", tmp_path / "tower", "--part", "vision", "--to", "hf")
    tower = hf.CLIPVisionModel.from_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        theirs = clip.vision_model(pixels).last_hidden_state
        assert torch.equal(tower(pixels).last_hidden_state, theirs)


# Manners.


def test_what_cannot_be_is_refused_in_one_line(saved, refused, done, tmp_path):
    llava, out = saved("whole: llava"), tmp_path / "out"
    store.save_projector(tmp_path / "p", projector.init("linear", 12, 16, jax.random.key(0), 1.0), {})
    cases = {
        ("convert", tmp_path / "nothing", out): "write hf://OWNER/NAME, or add --download to convert",
        ("convert", llava, tmp_path / "p"): "exists already",
        ("convert", llava, out, "--to", "llava"): "--to llava needs --vision",
        ("convert", saved("whole: smolvlm"), out, "--to", "llava", "--vision", "x"): "has no layout",
        ("convert", saved("text: qwen2"), out, "--part", "projector"): "has no projector",
        ("convert", saved("text: qwen2"), out, "--part", "vision"): "no whole multimodal model",
        ("convert", llava, out, "--projector", tmp_path / "p"): "does not fit as the model's projector",
        ("convert", llava, out, "--projector", llava): "is no projector alone",
        ("convert", llava, out, "--projector", tmp_path / "none"): "no projector at",
        ("convert", saved("whole: smolvlm"), tmp_path / "x.bin", "--part", "projector"): "has no biases",
        ("convert", llava, out, "--language", llava): "goes with a projector alone",
        ("convert", tmp_path / "p", out, "--vision", saved("tower: clip")): "both --vision and --language",
        ("convert", tmp_path / "p", out, "--to", "hf"): "cannot be written to",
        ("convert", llava, out, "--shard-size", "big"): "'big' is no size",
        ("convert", llava, out, "--bin"): "--bin goes with --to llava",
        ("convert", llava, out, "--revision", "main"): "--revision main goes with a model of the hub",
        ("convert", tmp_path / "p", out, "--vision", saved("tower: clip"), "--language", saved("tower: clip")):
            "--vision must be",
    }  # fmt: skip
    for args, said in cases.items():
        assert said in refused(*args), args
        assert not out.exists()


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("written", [1000, 10**9])
def test_no_space_left(saved, command, small_disk, tmp_path, monkeypatch, to, written):
    """While it converts, and when the last is written."""
    monkeypatch.setattr(model_store, "_WRITTEN", written)
    source = saved("whole: llava")
    with small_disk(9000):
        ended = command("convert", source, tmp_path / "out", "--to", to)
    assert ended.status == 2 and "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"pivotjax convert: cannot write {tmp_path / 'out'}: ") and "free some space" in last, last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_an_interrupted_conversion_leaves_nothing(saved, command, tmp_path, monkeypatch, to):
    monkeypatch.setattr(model_store, "_WRITTEN", 1000)
    number = []
    finite = names.finite

    def interrupted(array):
        number.append(1)
        if len(number) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return finite(array)

    monkeypatch.setattr(names, "finite", interrupted)
    ended = command("convert", saved("whole: llava"), tmp_path / "out", "--to", to)
    assert ended.status == 130 and "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(tmp_path):
    """However many tensors there are, a few are held at a time."""
    specs = {f"t{i}": tensors.Spec(np.dtype(np.float32), (250_000,)) for i in range(40)}
    with tensors.ShardedWriter(tmp_path, tensors.sharded(specs, 10**9), {}) as writer:
        for i, name in enumerate(specs):
            writer.write(name, np.full(250_000, i, np.float32))
    alive, most, written = set(), [0], {}

    class Counting:
        def write(self, name, tensor):
            written[name] = tensor[0]

    def make(number):
        def change(tensor):
            alive.add(number)
            most[0] = max(most[0], len(alive))
            return tensor + 1

        return change

    class Forgetting(Counting):
        def write(self, name, tensor):
            super().write(name, tensor)
            alive.discard(int(name[1:]))

    with tensors.open_checkpoint(tmp_path) as checkpoint:
        steps = [moving.Step(checkpoint, (name,), make(i), name) for i, name in enumerate(specs)]
        moving.move(moving.in_order(steps), Forgetting(), "move", budget=4_000_000)
    assert most[0] <= 2 and written == {f"t{i}": i + 1 for i in range(40)}


def test_a_failure_in_any_thread_ends_the_move(tmp_path):
    specs = {f"t{i}": tensors.Spec(np.dtype(np.float32), (10,)) for i in range(50)}
    with tensors.ShardedWriter(tmp_path, tensors.sharded(specs, 10**9), {}) as writer:
        for name in specs:
            writer.write(name, np.zeros(10, np.float32))
    written = []

    def make(tensor):
        if len(written) > 5:
            raise RuntimeError("enough")
        return tensor

    class Writer:
        def write(self, name, tensor):
            written.append(name)

    with tensors.open_checkpoint(tmp_path) as checkpoint:
        steps = [moving.Step(checkpoint, (name,), make, name) for name in specs]
        with pytest.raises(RuntimeError, match="enough"):
            moving.move(steps, Writer(), "move")
    assert len(written) < 50


def test_groups_of_an_orbax_checkpoint_are_read_once(saved, done, tmp_path, monkeypatch):
    monkeypatch.setattr(model_store, "_READ", 2000)
    monkeypatch.setattr(model_store, "_WRITTEN", 3000)
    done("convert", saved("whole: llava"), tmp_path / "o")
    loads = []
    load = model_store.OrbaxModel._load
    monkeypatch.setattr(model_store.OrbaxModel, "_load", lambda self, names: loads.append(names) or load(self, names))
    done("convert", tmp_path / "o", tmp_path / "back")
    assert held(tmp_path / "back") == held(saved("whole: llava"))
    assert len(loads) > 3 and sum(map(len, loads)) == len(held(tmp_path / "back"))
    loads.clear()
    load_model(tmp_path / "o")
    assert sum(map(len, loads)) == len(held(tmp_path / "back"))


def test_buckets(saved, done, refused, tmp_path, monkeypatch):
    """`gs://` is another kind of path for the same code; here it is a local one of that kind."""
    path_of = hub.path_of
    monkeypatch.setattr(
        hub, "path_of",
        lambda where: epath.Path(tmp_path / where[5:]) if where.startswith("gs://") else path_of(where),
    )  # fmt: skip
    source = saved("whole: llava")
    done("convert", source, "gs://o")
    done("convert", "gs://o", tmp_path / "back")
    assert held(tmp_path / "back") == held(source)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "only Orbax checkpoints are written" in refused("convert", source, "gs://hf", "--to", "hf")
    assert "nothing else is read from a bucket" in refused("convert", "gs://back", tmp_path / "x")
