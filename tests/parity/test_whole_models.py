"""Whole models against transformers: tiny random ones, saved by transformers and loaded here."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_whole import IMAGE, TEXT, build, inputs_for, torch_inputs, torch_logits
from transformers import AutoConfig

import pivotjax
from pivotjax.checkpoints import names
from pivotjax.errors import InputError
from pivotjax.models import generation, language
from pivotjax.models.multimodal import FAMILIES, load_model
from pivotjax.models.multimodal import model as multimodal_model

CASES = {
    "llava llama clip": dict(family="llava", text="llama", tower="clip"),
    "llava mistral siglip": dict(family="llava", text="mistral", tower="siglip"),
    "llava qwen2 clip": dict(family="llava", text="qwen2", tower="clip"),
    "llava qwen3 siglip": dict(family="llava", text="qwen3", tower="siglip"),
    "llava phi3 clip": dict(family="llava", text="phi3", tower="clip"),
    "llava_next mistral clip": dict(family="llava_next", text="mistral", tower="clip"),
    "llava_next llama siglip": dict(family="llava_next", text="llama", tower="siglip"),
    "idefics3 llama": dict(family="idefics3", text="llama", tower="idefics3"),
    "smolvlm llama": dict(family="smolvlm", text="llama", tower="smolvlm"),
}
ODD = {
    "one layer, tied": dict(family="llava", text="llama", tower="clip", of_text=dict(
        num_hidden_layers=1, tie_word_embeddings=True, num_key_value_heads=1, head_dim=20), of_tower=dict(
        num_hidden_layers=1)),
    "layers side by side, class token": dict(family="llava", text="qwen2", tower="clip",
                                             vision_feature_layer=[-2, 1, 0], vision_feature_select_strategy="full"),
    "last layer, no projector bias": dict(family="llava", text="llama", tower="siglip", vision_feature_layer=-1,
                                          multimodal_projector_bias=False),
    "first token left out without a class token": dict(family="llava", text="llama", tower="siglip",
                                                       vision_feature_select_strategy="default"),
    "no head, biases": dict(family="llava", text="llama", tower="siglip", of_tower=dict(vision_use_head=False),
                            of_text=dict(attention_bias=True, mlp_bias=True)),
    "tiles, layers side by side": dict(family="llava_next", text="llama", tower="clip", vision_feature_layer=[1, 2]),
    "shuffled by 4, tied": dict(family="idefics3", text="llama", tower="idefics3", scale_factor=4,
                                tie_word_embeddings=True, of_text=dict(tie_word_embeddings=True)),
    "not shuffled": dict(family="smolvlm", text="llama", tower="smolvlm", scale_factor=1,
                         of_tower=dict(image_size=14)),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(case)`: transformers' model and ours, loaded from what it saved; each made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            model = build(**(CASES | ODD)[name])
            model.save_pretrained(folder)
            made[name] = model, load_model(folder)
        return made[name]

    return of


def assert_logits(model, ours, inputs):
    """Within 1e-4 of their scale wherever there is a token; else the first hidden states that differ are named."""
    expected, found = torch_logits(model, inputs), np.asarray(ours.logits(**inputs))
    assert found.shape == expected.shape and found.dtype == np.float32
    real = inputs["attention_mask"].astype(bool)
    scale, error = np.abs(expected[real]).max(), np.abs(expected - found)[real].max()
    assert scale > 1  # the comparison means something
    assert error <= 1e-4 * scale, f"logits differ by {error:.2g} of {scale:.2g}\n{layer_by_layer(model, ours, inputs)}"


def layer_by_layer(model, ours, inputs) -> str:
    """The largest difference after each part: tower, projector, every layer of the decoder (behind its last norm)."""
    given = torch_inputs(inputs)
    extra = {name: inputs[name] for name in ours.family.inputs if name in inputs}
    with torch.no_grad():
        seen = model.get_image_features(
            pixel_values=given["pixel_values"], **{name: given[name] for name in extra}, output_hidden_states=True
        ).hidden_states
        states = model(**given, output_hidden_states=True).hidden_states
        norm = model.model.get_decoder().norm
        expected = [norm(state).numpy() for state in states[:-1]] + [states[-1].numpy()]
    images = ours._images(inputs["pixel_values"], extra)
    tower = nnx.merge(ours.graphdef, ours.params).vision
    lines = []
    for depth, state in enumerate(seen):
        found = tower(images.pixels.transpose(0, 2, 3, 1), images.patch_mask, depth=depth)
        real = slice(None) if images.patch_mask is None else images.patch_mask.reshape(len(found), -1)
        lines.append(f"tower behind layer {depth}: {np.abs(state.numpy() - np.asarray(found))[real].max():.2g}")
    prompt, mask = ours._embedded(inputs["token_ids"], inputs["pixel_values"], inputs["attention_mask"], extra)
    real = inputs["attention_mask"].astype(bool)
    length = real.shape[1]
    lines.append(f"embedded: {np.abs(states[0].numpy() - np.asarray(prompt)[:, :length])[real].max():.2g}")
    for depth in range(len(expected)):
        found = np.asarray(_after(ours, depth, prompt, mask))[:, :length]
        lines.append(f"behind layer {depth}: {np.abs(expected[depth] - found)[real].max():.2g}")
    return "\n".join(lines)


def _after(ours, depth, prompt, mask):
    """Hidden states of the first `depth` layers alone, behind the last norm."""
    config, held = ours.config.language, ours.params["language"]
    if depth == 0:
        wide = prompt / jnp.sqrt(jnp.mean(prompt**2, -1, keepdims=True) + config.norm_eps)
        return wide * held["norm"]["scale"]
    short = replace(config, num_layers=depth, windows=config.windows[:depth])
    kind = type(nnx.merge(ours._decoder, held))
    graphdef = nnx.split(nnx.eval_shape(lambda: kind(short, rngs=nnx.Rngs(0))))[0]
    module = nnx.merge(graphdef, held | {"layers": jax.tree.map(lambda w: w[:depth], held["layers"])})
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    return module(prompt, positions, mask[:, None] & jnp.tri(mask.shape[1], dtype=bool))[0]


@pytest.mark.parametrize("name", [*CASES, *ODD])
def test_logits_agree_with_transformers(pair, name):
    model, ours = pair(name)
    assert_logits(model, ours, inputs_for(model))
    assert_logits(model, ours, inputs_for(model, images=(1, 0), texts=(3, 30), seed=1, left=False))


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_those_of_transformers(pair, name):
    model, ours = pair(name)
    inputs = inputs_for(model, seed=2)
    given = torch_inputs(inputs)
    expected = model.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :].numpy()
    found = np.asarray(ours.generate(**inputs, max_new=32))
    assert found.dtype == np.int32 and found[:, : expected.shape[1]].tolist() == expected.tolist()
    assert (found[:, expected.shape[1] :] == 0).all()
    assert len({tuple(row) for row in found.tolist()}) > 1  # the images and prompts matter


def test_the_report_of_a_failure_names_the_first_layer_that_differs(pair):
    model, ours = pair("idefics3 llama")
    inputs = inputs_for(model)
    report = layer_by_layer(model, ours, inputs)
    differences = [float(line.split(": ")[1]) for line in report.splitlines()]
    assert len(differences) == 8 and max(differences) < 1e-4  # tower 0 to 3, embedded, behind 0, 1 and 2 layers
    o = ours.params["language"]["layers"]["o"]["kernel"]
    ours.params["language"]["layers"]["o"]["kernel"] = o.at[1].multiply(1.1)
    try:
        with pytest.raises(AssertionError, match="logits differ") as failure:
            assert_logits(model, ours, inputs)
    finally:
        ours.params["language"]["layers"]["o"]["kernel"] = o
    differences = [float(number) for number in re.findall(r"\bbehind layer \d: (\S+)", str(failure.value))]
    assert len(differences) == 7 and max(differences[:-1]) < 1e-4 < differences[-1]


def in_memory(key):
    """transformers from 4.52 on, before it is written."""
    key = re.sub(r"^language_model\.lm_head", "lm_head", key)
    key = re.sub(r"^language_model\.model\.", "model.language_model.", key)
    return re.sub(r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1", key)


LAYOUTS = {
    "before 4.52": lambda key: re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key),
    "4.52 to 4.57": lambda key: in_memory(LAYOUTS["before 4.52"](key)),
    "5, in memory": in_memory,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llava llama clip", "llava_next llama siglip"])
def test_old_and_new_layouts_are_read(pair, tmp_path, name, layout):
    model, ours = pair(name)
    model.save_pretrained(tmp_path)
    tensors = {LAYOUTS[layout](key): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    tower, text = ("vision_tower.vision_model", "language_model.model")
    if layout != "before 4.52":
        tower, text = "model.vision_tower.vision_model", "model.language_model"
    tensors[f"{tower}.embeddings.position_ids"] = np.arange(17)[None]  # buffers of old versions
    tensors[f"{text}.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    for found, expected in zip(jax.tree.leaves(load_model(tmp_path).params), jax.tree.leaves(ours.params), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("name", [*CASES, *ODD])
def test_the_layout_that_is_written_is_read_by_transformers(pair, tmp_path, name):
    """By the same tables, backwards: no tensor is missing or unknown there, and all are bitwise equal."""
    model, ours = pair(name)
    model.save_pretrained(tmp_path)
    plan = names.leaves(ours.family.names(ours.config), ours.params)
    tensors = {}
    for leaf, value in zip(plan, jax.tree.leaves(ours.params)):
        values = np.asarray(value) if leaf.stacked else np.asarray(value)[None]
        for entry, one in zip(leaf.entries, values):
            tensors[entry.keys[0]] = np.ascontiguousarray(entry.transform.inverse(one))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_fields_that_config_json_leaves_out(tmp_path):
    """transformers writes the parts' fields only where they differ from its classes' defaults."""
    model = build("llava", "mistral", "clip", of_text=dict(sliding_window=4096, rms_norm_eps=1e-6))
    model.save_pretrained(tmp_path)
    expected = load_model(tmp_path).config
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        kind = config[part]["model_type"]
        default = AutoConfig.for_model(kind).to_dict()
        config[part] = {k: v for k, v in config[part].items() if default.get(k, ...) != v} | {"model_type": kind}
    config = {k: v for k, v in config.items() if k not in ("vision_feature_layer", "projector_hidden_act")}
    assert "sliding_window" not in config["text_config"] and "hidden_act" not in config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).config == expected


def test_published_configs():
    """What the hub's config.json say, with the fields that they leave out; sizes as the models are known to have."""
    clip = dict(hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
                num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000)
    vicuna = dict(architectures=["LlamaForCausalLM"], max_position_embeddings=4096, model_type="llama",
                  rms_norm_eps=1e-05, torch_dtype="float16", vocab_size=32064)
    llava = FAMILIES["llava"].config(
        dict(model_type="llava", image_token_index=32000, pad_token_id=32001, projector_hidden_act="gelu",
             text_config=vicuna, vision_config=clip, vision_feature_layer=-2, tie_word_embeddings=False,
             vision_feature_select_strategy="default", vocab_size=32064), "llava-1.5-7b-hf")  # fmt: skip
    assert (llava.language.dim, llava.language.num_layers, llava.language.mlp_dim) == (4096, 32, 11008)
    assert (llava.image_tokens, llava.depths, llava.drop_first, llava.vision.activation) == (576, (23,), True,
                                                                                           "quick_gelu")
    mistral = dict(architectures=["MistralForCausalLM"], intermediate_size=14336, max_position_embeddings=32768,
                   model_type="mistral", num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=1000000.0,
                   sliding_window=None, vocab_size=32064)
    following = FAMILIES["llava_next"].config(
        dict(model_type="llava_next", image_token_index=32000, text_config=mistral, vision_config=clip), "llava-v1.6")
    assert following.language.rope.base == 1e6 and following.language.windows == () and len(following.grids) == 5
    smol = FAMILIES["smolvlm"].config(
        dict(model_type="smolvlm", image_token_id=49190, scale_factor=4, tie_word_embeddings=False,
             text_config=dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                              num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-05, vocab_size=49280,
                              rope_theta=100000, max_position_embeddings=8192, pixel_shuffle_factor=4),
             vision_config=dict(model_type="smolvlm_vision", hidden_size=768, image_size=512, num_attention_heads=12,
                                patch_size=16, max_image_size={"longest_edge": 512})), "SmolVLM2-256M")  # fmt: skip
    assert (smol.image_tokens, smol.connector, smol.vision.mlp_dim) == (64, "pixel_shuffle4_linear", 3072)


def test_compiled_once_a_bucket(pair):
    model, ours = pair("llava llama clip")
    compiled = (multimodal_model._embedded, multimodal_model._logits, generation._generate)
    ours.generate(**inputs_for(model, images=(1, 1)), max_new=4)
    ours.logits(**inputs_for(model, images=(1, 1)))
    before = [function._cache_size() for function in compiled]
    for texts in ((2, 3), (9, 1)):
        inputs = inputs_for(model, images=(1, 1), texts=texts, seed=5)
        ours.generate(**inputs, max_new=20)
        ours.logits(**inputs)
    assert [function._cache_size() for function in compiled] == before


def test_images_are_filled_up_to_few_counts(pair):
    model, ours = pair("llava llama clip")
    assert {len(multimodal_model._filled(np.zeros((n, 1)))) for n in range(1, 17)} == {1, 2, 3, 4, 6, 8, 12, 16}
    assert_logits(model, ours, inputs_for(model, images=(3, 1, 1)))  # 5 images, filled up to 6


def test_weights_are_held_once_and_a_projector_is_exchanged_in_place(pair):
    model, ours = pair("llava qwen2 clip")
    inputs = inputs_for(model)
    before = np.asarray(ours.logits(**inputs))
    old = ours.params["projector"]
    ours.params["projector"] = jax.tree.map(lambda w: 2 * w, old)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(2)
    assert_logits(model, ours, inputs)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.div_(2)
    ours.params["projector"] = old
    assert (np.asarray(ours.logits(**inputs)) == before).all()
    text = jax.make_jaxpr(lambda p, t: multimodal_model._embedded.__wrapped__(ours.graphdef, p, t))(
        ours.params, np.zeros((1, 4), np.int32))
    assert not text.consts  # weights are arguments


def test_bfloat16_and_chosen_places(pair, tmp_path):
    model, ours = pair("llava phi3 clip")
    model.save_pretrained(tmp_path)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    seen = {}

    def place(name, leaf):
        seen[name] = leaf.shape
        return device

    narrow = pivotjax.load_model(tmp_path, jnp.bfloat16, shardings=place)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {np.dtype(jnp.bfloat16)}
    assert seen["language/layers/qkv/kernel"] == (2, 32, 64) and len(seen) == len(jax.tree.leaves(narrow.params))
    inputs = inputs_for(model)
    real = inputs["attention_mask"].astype(bool)
    wide, found = np.asarray(ours.logits(**inputs))[real], np.asarray(narrow.logits(**inputs))[real]
    assert found.dtype == np.float32 and 0 < np.abs(wide - found).mean() < 0.05 * np.abs(wide).max()


SPREAD = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import pivotjax

inputs = dict(np.load(sys.argv[2]))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

def place(name, leaf):
    wide = name.startswith("language/layers") and name.endswith("kernel")
    return NamedSharding(mesh, P(None, None, "fsdp") if wide else P())

model = pivotjax.load_model(sys.argv[1], shardings=place)
assert len(model.params["language"]["layers"]["q"]["kernel"].addressable_shards) == 4
np.savez(sys.argv[3], logits=model.logits(**inputs), answer=model.generate(**inputs, max_new=8))
"""


@pytest.mark.slow
def test_a_model_spread_over_devices_says_the_same(pair, tmp_path):
    model, ours = pair("llava llama clip")
    model.save_pretrained(tmp_path)
    inputs = inputs_for(model)
    np.savez(tmp_path / "inputs.npz", **inputs)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": path}
    command = [sys.executable, "-c", SPREAD, tmp_path, tmp_path / "inputs.npz", tmp_path / "found.npz"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = np.load(tmp_path / "found.npz")
    expected = np.asarray(ours.logits(**inputs))
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert (found["answer"] == np.asarray(ours.generate(**inputs, max_new=8))).all()


def test_sampling_and_stop_tokens(pair):
    model, ours = pair("llava llama clip")
    inputs = inputs_for(model)
    free = np.asarray(ours.generate(**inputs, max_new=12, stop=[]))
    stop = int(free[0, 3])
    first = free[0].tolist().index(stop)
    stopped = np.asarray(ours.generate(**inputs, max_new=12, stop=[stop]))
    assert stopped[0].tolist() == free[0, : first + 1].tolist() + [ours.pad_token] * (11 - first)
    key = jax.random.key(0)
    drawn = [np.asarray(ours.generate(**inputs, max_new=12, temperature=2.0, top_p=p, key=key)) for p in (1.0, 1e-6)]
    assert (drawn[0] != free).any() and (drawn[1] == np.asarray(ours.generate(**inputs, max_new=12))).all()


@pytest.mark.parametrize("kind", language.FAMILIES)
def test_a_language_model_alone(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT[kind]()).eval()
    model.save_pretrained(tmp_path)
    ours = pivotjax.load_model(tmp_path)
    tokens = np.random.default_rng(0).integers(3, IMAGE, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.asarray(ours.logits(tokens)) - expected).max() <= 1e-4 * np.abs(expected).max()
    with pytest.raises(InputError, match="no images"):
        ours.logits(tokens, np.zeros((1, 3, 18, 18)))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(token_ids=np.full((1, 9), IMAGE)), "9 image tokens for 16 visual tokens"),
        (dict(pixel_values=None), "no pixel_values"),
        (dict(pixel_values=np.zeros((1, 1, 3, 18, 18))), r"\[images, 3, height, width\]"),
        (dict(pixel_values=np.zeros((1, 3, 20, 18))), "18 x 18"),
        (dict(image_sizes=np.array([[18, 18]])), "takes no image_sizes"),
        (dict(attention_mask=np.ones((1, 3))), "attention_mask too"),
        (dict(token_ids=np.full((1, 9), 93)), "token id 93"),
    ],
)
def test_arrays_that_do_not_fit_are_one_clear_line(pair, change, words):
    model, ours = pair("llava llama clip")
    inputs = inputs_for(model, images=(1,), texts=(3,)) | change
    if "token_ids" in change:
        del inputs["attention_mask"]
    with pytest.raises(InputError, match=words) as error:
        ours.logits(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llava_next llama siglip", dict(image_sizes=np.array([[18, 18], [9, 9]])), "image_sizes"),
        ("llava_next llama siglip", dict(pixel_values=np.zeros((1, 2, 3, 18, 18))), "3 tiles; pixel_values holds 2"),
        ("idefics3 llama", dict(pixel_values=np.ones((1, 3, 16, 16))), "tiles"),
        ("idefics3 llama", dict(pixel_attention_mask=np.ones((1, 1, 9, 9))), "pixel_attention_mask"),
    ],
)
def test_tiles_that_do_not_fit_are_one_clear_line(pair, name, change, words):
    model, ours = pair(name)
    with pytest.raises(InputError, match=words) as error:
        ours.logits(**inputs_for(model, images=(1,), texts=(3,)) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2"),
        ({"vision_feature_layer": 7}, "vision_feature_layer"),
        ({"vision_feature_layer": []}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "all"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"image_token_index": "<image>"}, "image_token_index"),
        ({"multimodal_projector_bias": False}, "unknown"),
        ({"tie_word_embeddings": True}, None),  # an `lm_head` that is there too is not needed
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(pair, tmp_path, change, words):
    model, _ = pair("llava llama clip")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    if words is None:
        assert "head" not in load_model(tmp_path).params["language"]
        return
    with pytest.raises(InputError, match=words) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "grids", [[[18, 30]], [[18]], "any", [[0, 18]]], ids=["no multiple", "no pair", "no list", "no size"]
)
def test_grids_that_cannot_be(pair, tmp_path, grids):
    model, _ = pair("llava_next llama siglip")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": grids}))
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        load_model(tmp_path)


def test_what_is_no_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="there is no model at"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="mapping of fields"):
        load_model(tmp_path)
