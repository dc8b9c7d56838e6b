"""The Llama family in llama.cpp's GGUF files (`general.architecture` "llama"). They are read, not written."""

from pivotjax.checkpoints.gguf import GGUF, unpermuted
from pivotjax.checkpoints.names import Names, Rule, Transform, transposed
from pivotjax.errors import InputError
from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.rope import Rope


def config(file: GGUF) -> DecoderConfig:
    """Sizes from the header."""
    heads, dim = int(file.metadata("llama.attention.head_count")), int(file.metadata("llama.embedding_length"))
    head_dim = int(file.metadata("llama.attention.key_length", dim // heads))
    if int(file.metadata("llama.rope.dimension_count", head_dim)) != head_dim:
        raise InputError(f"{file.path}: rotary embedding of a part of each head is not supported")
    if (scaling := file.metadata("llama.rope.scaling.type", "none")) != "none":
        raise InputError(f"{file.path}: rope scaling {scaling!r} is not read from GGUF; give the Hugging Face folder")
    return DecoderConfig(
        vocab_size=len(file.metadata("tokenizer.ggml.tokens")),
        dim=dim,
        num_layers=int(file.metadata("llama.block_count")),
        num_heads=heads,
        num_kv_heads=int(file.metadata("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        mlp_dim=int(file.metadata("llama.feed_forward_length")),
        rope=Rope(float(file.metadata("llama.rope.freq_base", 10000.0))),
        norm_eps=float(file.metadata("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in file,
        max_length=int(file.metadata("llama.context_length")),
    )


def names(config: DecoderConfig) -> Names:
    """llama.cpp's names; its queries and keys have their rows in another order."""

    def reordered(heads):
        return Transform(lambda weight: unpermuted(weight, heads).T, None)

    return Names(
        (
            Rule("embedding", ("token_embd.weight",)),
            Rule("norm/scale", ("output_norm.weight",)),
            Rule("head/kernel", ("output.weight",), transposed),
            Rule("layers/{layer}/attention_norm/scale", ("blk.{layer}.attn_norm.weight",)),
            Rule("layers/{layer}/q/kernel", ("blk.{layer}.attn_q.weight",), reordered(config.num_heads)),
            Rule("layers/{layer}/k/kernel", ("blk.{layer}.attn_k.weight",), reordered(config.num_kv_heads)),
            Rule("layers/{layer}/v/kernel", ("blk.{layer}.attn_v.weight",), transposed),
            Rule("layers/{layer}/o/kernel", ("blk.{layer}.attn_output.weight",), transposed),
            Rule("layers/{layer}/mlp_norm/scale", ("blk.{layer}.ffn_norm.weight",)),
            Rule("layers/{layer}/gate/kernel", ("blk.{layer}.ffn_gate.weight",), transposed),
            Rule("layers/{layer}/up/kernel", ("blk.{layer}.ffn_up.weight",), transposed),
            Rule("layers/{layer}/down/kernel", ("blk.{layer}.ffn_down.weight",), transposed),
        )
    )
