"""Every family of language models against transformers: tiny random models with odd configs, through a saved folder."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pivotjax.checkpoints import names
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.errors import InputError
from pivotjax.models.generation import generate_from
from pivotjax.models.language import FAMILIES, abstract, load_weights

SIZES = dict(
    hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=61, max_position_embeddings=96, rms_norm_eps=1e-4, eos_token_id=None, bos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=40,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=2e2, factor=4.0, original_max_position_embeddings=24)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    long_factor=[1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
)  # fmt: skip
CASES = {
    "llama": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e3))),
    "llama_one_layer_one_kv_head_tied": ("llama", dict(
        num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_heads_wider_than_the_model": ("llama", dict(head_dim=20, num_key_value_heads=4)),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=None)),
    "llama_rope_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama_rope_dynamic": ("llama", dict(
        max_position_embeddings=14, rope_parameters=dict(rope_type="dynamic", rope_theta=1e2, factor=4.0))),
    "llama_rope_llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama_rope_yarn": ("llama", dict(rope_parameters=YARN)),
    "qwen2_rope_yarn_every_field": ("qwen2", dict(rope_parameters=YARN | dict(
        beta_fast=3, beta_slow=0.5, truncate=False, mscale=1.2, mscale_all_dim=0.7))),
    "mistral_window": ("mistral", dict(sliding_window=5, head_dim=8)),
    "mistral_no_window": ("mistral", dict(sliding_window=None, num_key_value_heads=1)),
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_windows_from_layer_one": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=20)),
    "qwen3_bias_tied_windows": ("qwen3", dict(
        head_dim=8, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True, sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "phi3": ("phi3", dict(num_key_value_heads=1)),
    "phi3_window_part_of_heads": ("phi3", dict(
        sliding_window=5, rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.75))),
    "phi3_longrope": ("phi3", dict(original_max_position_embeddings=22, rope_parameters=LONGROPE)),
    "phi3_longrope_switched": ("phi3", dict(
        original_max_position_embeddings=8, rope_parameters=LONGROPE | dict(attention_factor=1.3))),
}  # fmt: skip


def torch_model(family, **settings):
    """A random model of transformers, far from the initial norms of 1, biases of 0 and kernels near 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(case)`: the folder that transformers wrote, and its model."""

    @cache
    def make(case):
        family, settings = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        torch_model(family, **settings).save_pretrained(folder)
        return folder

    return lambda case: (make(case), AutoModelForCausalLM.from_pretrained(make(case), dtype=torch.float32).eval())


def load(folder):
    """The config, graph and parameters of a saved folder; no tokenizer is asked for."""
    settings = json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings, str(folder))
    return config, *load_weights(family, config, open_checkpoint(folder), jnp.float32, str(folder))


def hidden_of(graphdef, params, tokens):
    module = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return module(module.embed(tokens), positions, None)[0]


def logits_of(graphdef, params, tokens):
    return np.asarray(nnx.merge(graphdef, params).logits(hidden_of(graphdef, params, tokens)))


def some_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


def close(ours, theirs):
    """Within 1e-4 of the other side's largest value."""
    return np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def first_difference(config, params, model, tokens):
    """Which part differs first: both sides cut after every layer, seen through the final norm."""
    with torch.no_grad():
        output = model.model(torch.tensor(tokens), output_hidden_states=True)
        theirs = [*map(model.model.norm, output.hidden_states[1:-1]), output.last_hidden_state]
    if not close(np.asarray(params["embedding"])[tokens], output.hidden_states[0].numpy()):
        return "the embeddings differ"
    for depth, expected in enumerate(theirs, 1):
        cut = replace(config, num_layers=depth, windows=config.windows[:depth])
        graphdef, _ = abstract(FAMILIES["llama"], cut, jnp.float32)
        layers = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params["layers"])
        if not close(hidden_of(graphdef, params | {"layers": layers}, tokens), expected.numpy()):
            return f"the hidden states differ first after layer {depth - 1}"
    return "the hidden states agree, the output head differs"


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(saved, case):
    folder, model = saved(case)
    config, graphdef, params = load(folder)
    tokens = some_tokens((3, 17))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1  # the comparison means something
    assert close(logits_of(graphdef, params, tokens), expected), first_difference(config, params, model, tokens)


def test_the_layer_that_differs_is_named(saved):
    folder, model = saved("qwen3_bias_tied_windows")
    config, _, params = load(folder)
    tokens = some_tokens((2, 9))
    assert "agree" in first_difference(config, params, model, tokens)
    wrong = params["layers"] | {"up": {"kernel": params["layers"]["up"]["kernel"].at[1, 0, 0].add(0.5)}}
    assert first_difference(config, params | {"layers": wrong}, model, tokens).endswith("after layer 1")
    assert "embeddings" in first_difference(config, params | {"embedding": params["embedding"] + 1}, model, tokens)


def padded(rows, side, filler):
    """Prompts `[B, P]` and their mask, padded on one side."""
    longest = max(map(len, rows))
    tokens, mask = np.full((len(rows), longest), filler), np.zeros((len(rows), longest), int)
    for row, prompt in enumerate(rows):
        place = slice(len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        tokens[row, place], mask[row, place] = prompt, 1
    return tokens, mask


def continued(graphdef, params, rows, side, stop=(), filler=0):
    tokens, mask = padded(rows, side, filler)
    prompt = nnx.merge(graphdef, params).embed(tokens)
    return np.asarray(generate_from(graphdef, params, prompt, mask, stop=stop, pad_id=0, max_new=32)).tolist()


def continued_by_transformers(model, rows, stop=None):
    tokens, mask = map(torch.tensor, padded(rows, "left", 0))
    answer = model.generate(tokens, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=stop)
    return torch.nn.functional.pad(answer[:, tokens.shape[1] :], (0, 32 + tokens.shape[1] - answer.shape[1])).tolist()


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_token_for_token(saved, case):
    """32 tokens from prompts of three lengths, padded on either side; windows are shorter than the text."""
    folder, model = saved(case)
    _, graphdef, params = load(folder)
    rows = [some_tokens(n, seed=n) for n in (9, 4, 6)]
    expected = continued_by_transformers(model, rows)
    assert len({token for row in expected for token in row}) > 5
    assert continued(graphdef, params, rows, "left", filler=7) == expected
    assert continued(graphdef, params, rows, "right", filler=9) == expected


@pytest.mark.parametrize("case", ["llama", "phi3_longrope"])
def test_stop_tokens_as_transformers(saved, case):
    folder, model = saved(case)
    _, graphdef, params = load(folder)
    rows = [some_tokens(n, seed=n) for n in (9, 4, 6)]
    free = continued_by_transformers(model, rows)
    stop = [free[0][3], free[1][20]]  # the second row may end after frequencies have changed
    expected = continued_by_transformers(saved(case)[1], rows, stop)
    assert expected != free and 0 not in free[0][:4]
    assert continued(graphdef, params, rows, "left", stop) == expected
    assert continued(graphdef, params, rows, "right", stop) == expected


@pytest.mark.parametrize("case", CASES)
def test_names_are_a_bijection(saved, case):
    folder, _ = saved(case)
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings, "")
    leaves = names.leaves(family.names(config), abstract(family, config, jnp.float32)[1])
    entries = [entry for leaf in leaves for entry in leaf.entries]
    assert sorted(key for entry in entries for key in entry.keys) == sorted(tensors)
    assert len({entry.path for entry in entries}) == len(entries)
    for entry in entries:
        (key,) = entry.keys
        there = entry.transform.forward(tensors[key])
        assert there.shape == entry.shape
        np.testing.assert_array_equal(entry.transform.inverse(there), tensors[key])


@pytest.mark.parametrize("case", ["llama_biases", "mistral_window", "qwen2_tied", "qwen3", "phi3"])
def test_coverage(saved, case):
    folder, _ = saved(case)
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings, "")

    def read(tensors):
        return load_weights(family, config, tensors, jnp.float32, "here")

    key = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(InputError, match=f"here.*1 missing: {key}"):
        read({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(InputError, match=r"1 unknown: model\.layers\.1\.self_attn\.o_proj\.scale"):
        read(tensors | {"model.layers.1.self_attn.o_proj.scale": tensors[key]})
    read(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)})
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    read(copy)  # of tied embeddings, ignored
    if not config.tie_embeddings:
        with pytest.raises(InputError, match=r"1 missing: lm_head\.weight"):
            read({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})


def as_version_4(settings):
    """The fields of a config.json as transformers 4 wrote them."""
    old = {key: value for key, value in settings.items() if key not in ("rope_parameters", "layer_types")}
    rope = dict(settings["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope["type"] = rope.pop("rope_type")
    old["rope_scaling"] = None if rope["type"] == "default" else rope
    return old


@pytest.mark.parametrize("case", CASES)
def test_config_of_transformers_4_is_read_as_that_of_5(saved, case):
    if case == "qwen3_bias_tied_windows":
        pytest.skip("before layer_types, windows began at a layer")
    settings = json.loads((saved(case)[0] / "config.json").read_text())
    assert "rope_parameters" in settings and "rope_theta" not in settings
    family = FAMILIES[settings["model_type"]]
    assert family.config(as_version_4(settings), "") == family.config(settings, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_left_out_means_what_it_means_in_transformers(family):
    full = AutoConfig.for_model(family).to_dict()
    assert FAMILIES[family].config({"model_type": family}, "") == FAMILIES[family].config(full, "")


def test_old_words_of_phi3():
    scaled = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    new, *old = (
        FAMILIES["phi3"].config({"rope_scaling": scaled | {"type": kind}, "max_position_embeddings": 131072}, "")
        for kind in ("longrope", "su", "yarn")
    )
    assert old == [new, new] and new.rope.trained_length == 4096 and new.rope.scale == pytest.approx(1.190238)


def test_context_grows_with_the_embedding():
    """Vicuna 16k and Qwen2.5 give the length before stretching."""
    llama, qwen = FAMILIES["llama"], FAMILIES["qwen2"]
    vicuna = {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert llama.config(vicuna, "").max_length == 16384
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert qwen.config({"rope_scaling": yarn}, "").max_length == 131072


@pytest.mark.parametrize(
    "family, fields, words",
    [
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type 'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.*'factor'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling is not a mapping"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.*full_attention"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"head_dim": 5}, "5 of a head's 5 channels"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32, "use_sliding_window": True}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_one_clear_line(family, fields, words):
    with pytest.raises(InputError, match=words) as error:
        FAMILIES[family].config(fields, "config.json")
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json") and len(str(error.value)) < 400
