"""The decoder against transformers: random tiny models through a saved folder, and SmolLM2's real weights."""

import json
import sys
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pivotjax.errors import InputError
from pivotjax.models.generation import generate
from pivotjax.models.language import Cache, Plan, load_language

EIFFEL = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)
VOCAB = 61
SHAPES = {
    "grouped": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "one_kv_head_untied": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=12, tie_word_embeddings=False),
    "wide_heads": dict(num_attention_heads=2, num_key_value_heads=2, head_dim=40, tie_word_embeddings=False),
    "narrow_heads_tied": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=4, tie_word_embeddings=True),
}


def save_tiny(folder, seed=0, max_shard_size="5GB", dtype=torch.float32, **shape):
    """A random Llama of transformers in `folder`, with a tokenizer; returns the torch model."""
    torch.manual_seed(seed)
    settings = dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, vocab_size=VOCAB, eos_token_id=1,
                    rope_theta=5e3, rms_norm_eps=1e-4, max_position_embeddings=96)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the initial norms of 1 and kernels near 0
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model


def logits_of(language, tokens):
    module = nnx.merge(language.graphdef, language.params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(module.logits(module(module.embed(tokens), positions, None)[0]))


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def some_tokens(shape):
    return np.random.default_rng(0).integers(0, VOCAB, shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_model_agrees_with_transformers(tmp_path, shape):
    model = save_tiny(tmp_path, **shape)
    language = load_language(tmp_path)
    tokens = some_tokens((3, 17))
    expected = torch_logits(model, tokens)
    assert np.abs(expected).max() > 1  # the comparison below means something
    np.testing.assert_allclose(logits_of(language, tokens), expected, atol=1e-4, rtol=0)
    assert language.eos_id == 1 and language.tokenizer.encode("w7").ids == [7]
    assert language.config.tie_embeddings == shape["tie_word_embeddings"]


def test_sharded_bfloat16_folder_loads_in_the_asked_dtype(tmp_path):
    model = save_tiny(tmp_path, max_shard_size="20KB", dtype=torch.bfloat16, **SHAPES["one_kv_head_untied"])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = some_tokens((2, 9))
    wide, narrow = load_language(tmp_path), load_language(tmp_path, jnp.bfloat16)
    np.testing.assert_allclose(logits_of(wide, tokens), torch_logits(model, tokens), atol=1e-4, rtol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {np.dtype(jnp.bfloat16)}
    assert logits_of(narrow, tokens).dtype == np.float32
    error = np.abs(logits_of(narrow, tokens) - logits_of(wide, tokens))
    assert 0 < error.mean() < 0.05  # bfloat16 keeps 8 bits
    assert wide.identity == narrow.identity and len(wide.identity) == 64


def test_cache_in_pieces_equals_one_pass(tmp_path):
    save_tiny(tmp_path, **SHAPES["grouped"])
    language = load_language(tmp_path)
    module = nnx.merge(language.graphdef, language.params)
    tokens = some_tokens((2, 12))
    cache, pieces, slots = Cache.empty(language.config, 2, 16), [], jnp.arange(16)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
        x = module.embed(tokens[:, start:end])
        hidden, cache = module(x, positions, slots <= positions[..., None], cache, start)
        pieces.append(module.logits(hidden))
    np.testing.assert_allclose(np.concatenate(pieces, 1), logits_of(language, tokens), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="mask"):
        module(x, positions, None, cache)


def test_remat_changes_no_gradient(tmp_path):
    save_tiny(tmp_path, **SHAPES["grouped"])
    language = load_language(tmp_path)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 48)), jnp.float32)

    def total(x, remat):
        module = nnx.merge(language.graphdef, language.params)
        return jnp.square(module(x, jnp.broadcast_to(jnp.arange(7), (2, 7)), None, plan=Plan(remat))[0]).sum()

    plain, recomputed = (jax.grad(total)(x, remat) for remat in ("none", "layers"))
    np.testing.assert_allclose(plain, recomputed, rtol=1e-5, atol=1e-5)
    assert "remat" in str(jax.make_jaxpr(jax.grad(total), static_argnums=1)(x, "layers"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope_type 'axial'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": None}, "4096"),  # transformers' default where the field is left out
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"intermediate_size": 64}, "mlp_dim|shape"),
        ({"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(tmp_path, change, words):
    save_tiny(tmp_path, **SHAPES["grouped"])
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(InputError, match=words) as error:
        load_language(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_damaged_files_are_one_clear_line(tmp_path):
    save_tiny(tmp_path, **SHAPES["grouped"])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for path, words in ((tmp_path, "whole safetensors"), (tmp_path / "absent", "no language model"), (file, "gguf")):
        with pytest.raises(InputError, match=words):
            load_language(path)


def write_gguf(path, model):
    """The torch model as llama.cpp's converter writes it: its tensor names, its order of rows in queries and keys."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<", "0", "<0", *(f"<{i}>" for i in range(3, VOCAB))])
    writer.add_token_types([1] * 3 + [3] * (VOCAB - 3))
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(1)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if count := heads.get(name.split(".")[-2]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gguf_agrees_with_transformers(tmp_path, shape):
    model = save_tiny(tmp_path, **shape)
    write_gguf(tmp_path / "model.gguf", model)
    language = load_language(tmp_path / "model.gguf")
    eps = pytest.approx(language.config.norm_eps, rel=1e-6)  # float32 in the file
    assert load_language(tmp_path).config == replace(language.config, norm_eps=eps)
    tokens = some_tokens((2, 11))
    np.testing.assert_allclose(logits_of(language, tokens), torch_logits(model, tokens), atol=1e-4, rtol=0)


def test_damaged_gguf_and_missing_package_are_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, save_tiny(tmp_path, **SHAPES["grouped"]))
    data = path.read_bytes()
    for cut in (0, 4, 30, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match="whole GGUF") as error:
            load_language(path)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="demo"):
        load_language(path)


@pytest.fixture(scope="module")
def smollm(assets):
    return load_language(assets("smollm2-135m")["smollm2-135m"])


@pytest.fixture(scope="module")
def smollm_torch(assets):
    """The same file through transformers' own GGUF reader, which un-permutes by its own code."""
    path = assets("smollm2-135m")["smollm2-135m"]
    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys  # tied
    return model


def ids(language, text):
    return np.asarray([language.tokenizer.encode(text).ids])


@pytest.mark.assets
def test_smollm2_knows_paris_and_its_perplexity(smollm):
    prompt = ids(smollm, "The capital of France is")
    assert smollm.tokenizer.decode([logits_of(smollm, prompt)[0, -1].argmax()]) == " Paris"
    tokens = ids(smollm, EIFFEL)
    log_probability = jax.nn.log_softmax(logits_of(smollm, tokens)[0, :-1])
    perplexity = np.exp(-np.mean(log_probability[np.arange(tokens.shape[1] - 1), tokens[0, 1:]]))
    assert perplexity == pytest.approx(6.2567, abs=1e-3)
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm.params)) == 134_515_008


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm, smollm_torch):
    # Logits reach 40 here, where both sides' float32 differs from float64 by up to 1e-4: hence 1e-4 + 1e-5 |logit|.
    for text in (EIFFEL, "The capital of France is", "\nfrench fries", "def f(x):\n    return x + 1"):
        tokens = ids(smollm, text)
        np.testing.assert_allclose(logits_of(smollm, tokens), torch_logits(smollm_torch, tokens), atol=1e-4, rtol=1e-5)


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_greedy_token_for_token(smollm, smollm_torch):
    question = "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"
    for text in ("The capital of France is", question):
        tokens = ids(smollm, text)
        ours = np.asarray(generate(smollm, smollm.params, None, tokens, max_new=24))[0].tolist()
        theirs = smollm_torch.generate(torch.tensor(tokens), max_new_tokens=24, do_sample=False, pad_token_id=2)
        theirs = theirs[0, tokens.shape[1] :].tolist()
        assert ours == theirs + [smollm.eos_id] * (24 - len(theirs))


@pytest.mark.assets
def test_tokenizer_agrees_with_transformers(assets, smollm):
    from transformers import AutoTokenizer

    path = assets("smollm2-135m")["smollm2-135m"]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (EIFFEL, "a red\tapple 12345 🍎 naïve\n\n  x<|im_end|>foo", "  日本語 don't", "", "\n"):
        assert smollm.tokenizer.encode(text).ids == theirs.encode(text)
        assert smollm.tokenizer.decode(smollm.tokenizer.encode(text).ids, skip_special_tokens=False) == text
