"""The LLaVA repository's layout: read, and beside transformers' one in both directions."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_whole import IMAGE, VOCAB, build, inputs_for, torch_inputs, torch_logits
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipVisionModel

from pivotjax.checkpoints import names
from pivotjax.checkpoints.names import Transform
from pivotjax.errors import InputError
from pivotjax.models.multimodal import FAMILIES, abstract, llava_original, load_model
from pivotjax.models.multimodal.llava_original import (
    hugging_face_rows,
    hugging_face_settings,
    image_token_of,
    original_rows,
    original_settings,
    resized,
)

ROWS = IMAGE  # of the original vocabulary: the image token is the first that was added
# What convert_llava_weights_to_hf.py of transformers does to names, backwards.
TO_ORIGINAL = [
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^language_model\.", ""),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^image_newline", "model.image_newline"),
]
MM = {"mm_vision_tower": "openai/some-tower", "mm_hidden_size": 24, "mm_vision_select_layer": -2,
      "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
      "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False,
      "use_mm_proj": True}  # fmt: skip


def original_key(key):
    for pattern, replacement in TO_ORIGINAL:
        key = re.sub(pattern, replacement, key)
    return key


def tensors_of(model):
    """By the names that transformers writes."""
    return {re.sub(r"^model\.(language_model)\.", r"\1.model.", key).removeprefix("model."): value.numpy()
            for key, value in model.state_dict().items()}  # fmt: skip


def language_key(key):
    return "language_model.lm_head.weight" if key == "lm_head.weight" else key


def save_original(folder, model, *, tower=True, rows=ROWS, **fields):
    """What the LLaVA repository would have saved: without the rows of the image and padding tokens."""
    held = {original_key(language_key(key)): value for key, value in tensors_of(model).items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        held[key] = np.ascontiguousarray(held[key][:rows])
    if not tower:
        held = {key: value for key, value in held.items() if "vision_tower" not in key}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "model.safetensors")
    kind = {"llama": "llava_llama", "mistral": "llava_mistral"}[model.config.text_config.model_type]
    text = {key: value for key, value in model.config.text_config.to_dict().items() if key != "architectures"}
    settings = text | {"model_type": kind, "vocab_size": rows} | MM | fields
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def llava():
    return build("llava", "llama", "clip")


def save_tower(folder, model, whole=False):
    config = model.config.vision_config
    if whole:
        clip = CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)))
        target = clip.vision_model
    else:
        clip = target = (SiglipVisionModel if config.model_type == "siglip_vision_model" else CLIPVisionModel)(config)
    target.load_state_dict(model.model.vision_tower.state_dict())
    clip.save_pretrained(folder)
    return folder


def assert_same_logits(model, ours, inputs):
    expected, found = torch_logits(model, inputs), np.asarray(ours.logits(**inputs))
    real = inputs["attention_mask"].astype(bool)
    expected = expected[..., :ROWS]
    assert found.shape == expected.shape
    assert np.abs(expected - found)[real].max() <= 1e-4 * np.abs(expected[real]).max()


@pytest.mark.parametrize("tower", ["inside", "beside", "within a whole CLIP"])
def test_logits_of_an_original_checkpoint(tmp_path, llava, tower):
    vision = save_tower(tmp_path / "tower", llava, whole=tower == "within a whole CLIP")
    folder = save_original(tmp_path / "llava", llava, tower=tower == "inside")
    ours = load_model(folder, vision=vision)
    inputs = inputs_for(llava)
    inputs["token_ids"] = np.where(inputs["token_ids"] == IMAGE, ours.config.image_token, inputs["token_ids"])
    assert_same_logits(llava, ours, inputs)
    expected = llava.generate(**torch_inputs(inputs), max_new_tokens=12, do_sample=False, suppress_tokens=[90, 91, 92])
    found = ours.generate(**inputs, max_new=12)
    assert (np.asarray(found) == expected[:, inputs["token_ids"].shape[1] :].numpy()).all()


def test_the_tower_that_config_json_names(tmp_path, llava):
    save_tower(tmp_path / "llava" / "tower", llava)
    folder = save_original(tmp_path / "llava", llava, tower=False, mm_vision_tower="tower")
    assert_same_logits(llava, load_model(folder), inputs_for(llava))
    folder = save_original(tmp_path / "other", llava, tower=False)
    with pytest.raises(InputError, match="openai/some-tower"):
        load_model(folder)


def test_tiles_and_other_choices(tmp_path):
    model = build("llava_next", "mistral", "clip")
    grids = [[w, h] for h, w in model.config.image_grid_pinpoints]
    folder = save_original(tmp_path / "next", model, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres",
                           image_grid_pinpoints=grids)  # fmt: skip
    assert_same_logits(model, load_model(folder, vision=save_tower(tmp_path / "a", model)), inputs_for(model))
    model = build("llava", "llama", "siglip", vision_feature_layer=-1)
    folder = save_original(tmp_path / "siglip", model, mm_vision_select_layer=-1)
    assert_same_logits(model, load_model(folder, vision=save_tower(tmp_path / "b", model)), inputs_for(model))
    model = build("llava", "llama", "clip", vision_feature_select_strategy="full")
    folder = save_original(tmp_path / "class", model, mm_vision_select_feature="cls_patch")
    assert_same_logits(model, load_model(folder, vision=save_tower(tmp_path / "c", model)), inputs_for(model))


def test_one_linear_layer(tmp_path, llava):
    """LLaVA's first stage; transformers' class has two layers always, so the sum is done here."""
    folder = save_original(tmp_path / "llava", llava, mm_projector_type="linear")
    state = {k: v for k, v in names_in(folder).items() if "mm_projector" not in k}
    random = np.random.default_rng(0)
    state["model.mm_projector.weight"] = random.normal(size=(32, 24)).astype(np.float32)
    state["model.mm_projector.bias"] = random.normal(size=32).astype(np.float32)
    save_file(state, folder / "model.safetensors")
    ours = load_model(folder, vision=save_tower(tmp_path / "tower", llava))
    inputs = inputs_for(llava)
    pixels = torch.tensor(inputs["pixel_values"])
    with torch.no_grad():
        seen = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        visual = seen @ torch.tensor(state["model.mm_projector.weight"]).T + torch.tensor(
            state["model.mm_projector.bias"])
        given = torch_inputs(inputs)
        embedded = llava.get_input_embeddings()(given["input_ids"])
        mask = (given["input_ids"] == IMAGE)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(mask, visual)
        expected = llava(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits.numpy()[..., :ROWS]
    real = inputs["attention_mask"].astype(bool)
    error = np.abs(expected - np.asarray(ours.logits(**inputs)))[real].max()
    assert error <= 1e-4 * np.abs(expected[real]).max()


def names_in(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_settings_go_there_and_back(family):
    model = build(family, "llama", "clip")
    there = json.loads(model.config.to_json_string())
    original = original_settings(there, "openai/some-tower", ROWS, "here")
    assert original["vocab_size"] == ROWS and original["mm_projector_type"] == "mlp2x_gelu"
    assert original["mm_vision_select_feature"] == "patch" and original["mm_vision_select_layer"] == -2
    assert original["architectures"] == ["LlavaLlamaForCausalLM"]
    back = hugging_face_settings(original, there["vision_config"], IMAGE, "here")
    config = FAMILIES[family].config
    assert back["model_type"] == family and back["text_config"]["vocab_size"] == ROWS
    back["text_config"]["vocab_size"] = VOCAB
    assert config(back, "here") == config(there, "here")
    kind = type(model.config)(**back)  # and transformers takes it
    assert kind.text_config.to_dict() == model.config.text_config.to_dict()
    again = original_settings(back | {"text_config": back["text_config"] | {"vocab_size": ROWS}}, "openai/some-tower",
                              ROWS, "here")  # fmt: skip
    assert again == original


def test_fields_that_older_versions_of_transformers_read():
    rope = dict(rope_type="linear", factor=2.0, rope_theta=5e5)
    model = build("llava", "llama", "clip", of_text=dict(rope_parameters=rope, pad_token_id=IMAGE + 1))
    there = json.loads(model.config.to_json_string()) | {"dtype": "bfloat16"}
    original = original_settings(there, "tower", ROWS, "here")
    assert "pad_token_id" not in original  # its row is not there
    assert original["torch_dtype"] == "bfloat16" and original["rope_theta"] == 5e5
    assert original["rope_scaling"]["type"] == "linear" and original["rope_scaling"]["factor"] == 2.0
    without = {key: value for key, value in original.items() if key != "rope_parameters"}
    configs = [FAMILIES["llava"].config(hugging_face_settings(one, there["vision_config"], IMAGE, "here"), "here")
               for one in (original, without)]  # fmt: skip
    assert configs[0].language.rope == configs[1].language.rope and configs[0].language.rope.divisors


def test_names_cover_every_tensor_of_both(llava):
    config = FAMILIES["llava"].config(llava.config.to_dict(), "here")
    _, shapes = abstract(FAMILIES["llava"], config, np.float32)
    written = tensors_of(llava)
    plan = names.leaves(llava_original.names(config), shapes)
    keys = {key for leaf in plan for entry in leaf.entries for key in entry.keys}
    assert keys == {original_key(language_key(key)) for key in written}


@pytest.mark.parametrize(
    "vocab_size, image_token, tokens, rows",
    [
        (32064, 32000, {f"t{i}": i for i in range(32000)} | {"<image>": 32000, "<pad>": 32001}, 32000),
        (32002, 32000, {f"t{i}": i for i in range(32000)} | {"<image>": 32000, "<pad>": 32001}, 32000),
        (32064, 32000, {}, 32064),  # not known to whom the rows belong
        (32064, 32000, {f"t{i}": i for i in range(32000)} | {"<image>": 32000, "<call>": 32001}, 32064),
        (32128, 32000, {f"t{i}": i for i in range(32000)} | {"<image>": 32000}, 32128),  # more than conversion adds
        (151936, 151646, {f"t{i}": i for i in range(151646)} | {"<image>": 151646}, 151936),  # had that room before
    ],
)
def test_rows_are_dropped_only_if_conversion_added_them(vocab_size, image_token, tokens, rows):
    assert original_rows(vocab_size, image_token, tokens) == rows


def test_rows_are_added_where_there_is_no_room():
    assert hugging_face_rows(32000, 32000) == 32064  # llava-1.5-7b-hf
    assert hugging_face_rows(151936, 151646) == 151936
    assert image_token_of(32000, {}) == 32000
    assert image_token_of(32000, {f"t{i}": i for i in range(32000)}) == 32000
    assert image_token_of(151936, {f"t{i}": i for i in range(151646)}) == 151646
    assert image_token_of(32064, {"a": 0, "<image>": 32000, "<pad>": 32001}) == 32000


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_added_rows_are_the_mean_and_dropped_rows_come_back_as_it(llava, dtype):
    config = FAMILIES["llava"].config(llava.config.to_dict(), "here")
    table = resized(llava_original.names(config), VOCAB, ROWS)
    changed = {rule.path: rule.transform for rule in table.rules if rule.path in ("language/embedding",
                                                                                  "language/head/kernel")}
    for path, leaf in (("language/embedding", lambda m: m), ("language/head/kernel", lambda m: m.T)):
        transform: Transform = changed[path]
        stored = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(dtype)
        ours = transform.forward(stored)
        assert ours.dtype == dtype and leaf(ours).shape == (VOCAB, 6)
        assert (leaf(ours)[:ROWS] == stored).all()
        np.testing.assert_allclose(leaf(ours)[ROWS:], np.tile(stored.mean(0, dtype=np.float64), (3, 1)), atol=1e-3)
        assert (transform.inverse(ours) == stored).all()  # there and back: bit for bit


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"mm_projector_type": "ldpnet"}, "ldpnet"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_resampler_type": "perceiver"}, "perceiver"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "anyres"),
    ],
)
def test_what_is_not_supported_is_one_clear_line(tmp_path, llava, change, words):
    folder = save_original(tmp_path / "llava", llava, **change)
    with pytest.raises(InputError, match=words) as error:
        load_model(folder, vision=save_tower(tmp_path / "tower", llava))
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"text_config": {"model_type": "phi3"}}, "phi3"),
    ],
)
def test_what_llava_cannot_say_is_one_clear_line(llava, change, words):
    there = json.loads(llava.config.to_json_string()) | change
    with pytest.raises(InputError, match=words) as error:
        original_settings(there, "tower", ROWS, "here")
    assert "\n" not in str(error.value)
