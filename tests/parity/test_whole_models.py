"""Whole models against transformers: tiny random ones, saved by transformers and loaded here."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_whole import build, inputs_for, torch_inputs, torch_logits

from pivotjax.models.multimodal import load_model

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
    with torch.no_grad():
        states = model(**torch_inputs(inputs), output_hidden_states=True).hidden_states
        norm = model.model.get_decoder().norm
        expected = [norm(state).numpy() for state in states[:-1]] + [states[-1].numpy()]
    prompt, mask = ours._embedded(
        inputs["token_ids"], inputs["pixel_values"], inputs["attention_mask"],
        {name: inputs[name] for name in ours.family.inputs if name in inputs},
    )  # fmt: skip
    real = inputs["attention_mask"].astype(bool)
    length = real.shape[1]
    lines = [f"embedded: {np.abs(states[0].numpy() - np.asarray(prompt)[:, :length])[real].max():.2g}"]
    for depth in range(len(expected)):
        found = np.asarray(_after(ours, depth, prompt, mask))[:, :length]
        lines.append(f"after layer {depth}: {np.abs(expected[depth] - found)[real].max():.2g}")
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
    module = nnx.merge(graphdef, held | {"layers": nnx.map_state(lambda w: w[:depth], nnx.State(held["layers"]))})
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
