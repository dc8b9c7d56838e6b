"""Language models: one loader for GGUF files and Hugging Face folders, and a registry of families."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from pivotjax.checkpoints import names
from pivotjax.checkpoints.gguf import GGUF, unpermuted
from pivotjax.checkpoints.names import Names, Rule, Transform, transposed
from pivotjax.checkpoints.safetensors_io import SafetensorsFolder
from pivotjax.errors import InputError
from pivotjax.files import read_json, sha256
from pivotjax.models.language.llama import Cache, Llama, LlamaConfig

__all__ = ["FAMILIES", "Cache", "Family", "Language", "Llama", "LlamaConfig", "abstract", "load_language"]


class Language(NamedTuple):
    """A frozen language model: `nnx.merge(graphdef, params)` is the network."""

    name: str
    config: LlamaConfig
    graphdef: nnx.GraphDef
    params: dict  # nested dict of arrays; layers stacked on a leading axis
    tokenizer: Tokenizer
    eos_id: int
    identity: str  # SHA-256 of the weight files


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints becomes a network: its sizes and its tensor names, in both formats."""

    module: Callable[..., nnx.Module]
    gguf_config: Callable[[GGUF], LlamaConfig]
    gguf_names: Callable[[LlamaConfig], Names]
    folder_config: Callable[[dict[str, Any], str], LlamaConfig]
    folder_names: Callable[[LlamaConfig], Names]


def load_language(path: Path, dtype=jnp.float32) -> Language:
    """Loads a `.gguf` file or a Hugging Face folder (config.json, safetensors, tokenizer.json) with weights in `dtype`.

    Tensors are read one at a time. InputError if the file is missing, damaged, or of an unknown architecture.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype)
    if not path.is_file():
        raise InputError(f"there is no language model at {path}; give a .gguf file or a Hugging Face folder")
    if path.suffix != ".gguf":
        raise InputError(f"{path} is no language model that can be read; give a .gguf file or a Hugging Face folder")
    return _load_gguf(path, dtype)


def abstract(family: Family, config: LlamaConfig, dtype) -> tuple[nnx.GraphDef, dict]:
    """The network's graph and its parameters as shapes only; nothing is allocated."""
    module = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _load_gguf(path: Path, dtype) -> Language:
    file = GGUF(path)
    family = _family(file.metadata("general.architecture"), path)
    config = family.gguf_config(file)
    graphdef, params = _load_weights(family, config, family.gguf_names(config), file, dtype, path)
    eos_id = int(file.metadata("tokenizer.ggml.eos_token_id"))
    return Language(path.stem, config, graphdef, params, file.tokenizer(), eos_id, sha256(path))


def _load_folder(path: Path, dtype) -> Language:
    settings = read_json(path / "config.json")
    family = _family(settings.get("model_type"), path)
    config = family.folder_config(settings, str(path / "config.json"))
    tensors = SafetensorsFolder(path)
    graphdef, params = _load_weights(family, config, family.folder_names(config), tensors, dtype, path)
    hashes = "".join(sha256(file) for file in tensors.files)
    identity = hashlib.sha256(hashes.encode()).hexdigest()
    return Language(path.name, config, graphdef, params, _tokenizer(path), _eos_id(settings, path), identity)


def _family(architecture: str | None, path: Path) -> Family:
    if architecture not in FAMILIES:
        raise InputError(f"{path}: architecture {architecture!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def _load_weights(family, config, table: Names, tensors: Mapping, dtype, path) -> tuple[nnx.GraphDef, dict]:
    graphdef, shapes = abstract(family, config, dtype)
    return graphdef, names.load(tensors, table, shapes, where=str(path))


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{file} is not a tokenizer ({error}); save the model's fast tokenizer there") from error


def _eos_id(settings: dict[str, Any], folder: Path) -> int:
    eos = settings.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise InputError(f"{folder / 'config.json'} has no eos_token_id; add it")
    return eos


# The Llama family.


def _llama_gguf_config(file: GGUF) -> LlamaConfig:
    heads, dim = int(file.metadata("llama.attention.head_count")), int(file.metadata("llama.embedding_length"))
    head_dim = int(file.metadata("llama.attention.key_length", dim // heads))
    if int(file.metadata("llama.rope.dimension_count", head_dim)) != head_dim:
        raise InputError(f"{file.path}: rotary embedding of a part of each head is not supported")
    return LlamaConfig(
        vocab_size=len(file.metadata("tokenizer.ggml.tokens")),
        dim=dim,
        num_layers=int(file.metadata("llama.block_count")),
        num_heads=heads,
        num_kv_heads=int(file.metadata("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        mlp_dim=int(file.metadata("llama.feed_forward_length")),
        rope_base=float(file.metadata("llama.rope.freq_base", 10000.0)),
        norm_eps=float(file.metadata("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in file,
        max_length=int(file.metadata("llama.context_length")),
    )


def _llama_folder_config(settings: dict[str, Any], where: str) -> LlamaConfig:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # transformers 5, older
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        f"rope_type {kind!r}": kind != "default",
        "attention_bias": settings.get("attention_bias", False),
        "mlp_bias": settings.get("mlp_bias", False),
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
    }
    for what, present in unsupported.items():
        if present:
            raise InputError(f"{where}: {what} is not supported in the Llama family; choose another model")
    try:
        heads, dim = settings["num_attention_heads"], settings["hidden_size"]
        return LlamaConfig(
            vocab_size=settings["vocab_size"],
            dim=dim,
            num_layers=settings["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or dim // heads,
            mlp_dim=settings["intermediate_size"],
            rope_base=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
            norm_eps=float(settings["rms_norm_eps"]),
            tie_embeddings=settings.get("tie_word_embeddings", False),
            max_length=settings["max_position_embeddings"],
        )
    except KeyError as error:
        raise InputError(f"{where} has no field {error.args[0]!r}; get the model's config.json again") from error


def _llama_gguf_names(config: LlamaConfig) -> Names:
    def rotated(heads):
        return Transform(lambda weight: unpermuted(weight, heads).T, None)

    rules = [
        Rule("embedding", ("token_embd.weight",)),
        Rule("norm/scale", ("output_norm.weight",)),
        Rule("head/kernel", ("output.weight",), transposed),
        Rule("layers/{layer}/attention_norm/scale", ("blk.{layer}.attn_norm.weight",)),
        Rule("layers/{layer}/q/kernel", ("blk.{layer}.attn_q.weight",), rotated(config.num_heads)),
        Rule("layers/{layer}/k/kernel", ("blk.{layer}.attn_k.weight",), rotated(config.num_kv_heads)),
        Rule("layers/{layer}/v/kernel", ("blk.{layer}.attn_v.weight",), transposed),
        Rule("layers/{layer}/o/kernel", ("blk.{layer}.attn_output.weight",), transposed),
        Rule("layers/{layer}/mlp_norm/scale", ("blk.{layer}.ffn_norm.weight",)),
        Rule("layers/{layer}/gate/kernel", ("blk.{layer}.ffn_gate.weight",), transposed),
        Rule("layers/{layer}/up/kernel", ("blk.{layer}.ffn_up.weight",), transposed),
        Rule("layers/{layer}/down/kernel", ("blk.{layer}.ffn_down.weight",), transposed),
    ]
    return Names(tuple(rules))


def _llama_folder_names(config: LlamaConfig) -> Names:
    layer = "model.layers.{layer}"
    rules = [
        Rule("embedding", ("model.embed_tokens.weight",)),
        Rule("norm/scale", ("model.norm.weight",)),
        Rule("head/kernel", ("lm_head.weight",), transposed),
        Rule("layers/{layer}/attention_norm/scale", (f"{layer}.input_layernorm.weight",)),
        Rule("layers/{layer}/q/kernel", (f"{layer}.self_attn.q_proj.weight",), transposed),
        Rule("layers/{layer}/k/kernel", (f"{layer}.self_attn.k_proj.weight",), transposed),
        Rule("layers/{layer}/v/kernel", (f"{layer}.self_attn.v_proj.weight",), transposed),
        Rule("layers/{layer}/o/kernel", (f"{layer}.self_attn.o_proj.weight",), transposed),
        Rule("layers/{layer}/mlp_norm/scale", (f"{layer}.post_attention_layernorm.weight",)),
        Rule("layers/{layer}/gate/kernel", (f"{layer}.mlp.gate_proj.weight",), transposed),
        Rule("layers/{layer}/up/kernel", (f"{layer}.mlp.up_proj.weight",), transposed),
        Rule("layers/{layer}/down/kernel", (f"{layer}.mlp.down_proj.weight",), transposed),
    ]
    ignore = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return Names(tuple(rules), ignore=ignore + ((r"lm_head\.weight",) if config.tie_embeddings else ()))


# Keyed by the checkpoint's own word for its architecture: `general.architecture` in GGUF, `model_type` in config.json.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        module=Llama,
        gguf_config=_llama_gguf_config,
        gguf_names=_llama_gguf_names,
        folder_config=_llama_folder_config,
        folder_names=_llama_folder_names,
    ),
}
