"""Tensor names of `LlamaForCausalLM`; most families share them."""

from pivotjax.checkpoints.names import Names, Rule, transposed
from pivotjax.models.language.decoder import DecoderConfig

LAYER = "model.layers.{layer}"
OUTSIDE = (
    Rule("embedding", ("model.embed_tokens.weight",)),
    Rule("norm/scale", ("model.norm.weight",)),
    Rule("head/kernel", ("lm_head.weight",), transposed),  # no leaf where the embeddings are tied
)
NORMS = (
    Rule("layers/{layer}/attention_norm/scale", (f"{LAYER}.input_layernorm.weight",)),
    Rule("layers/{layer}/mlp_norm/scale", (f"{LAYER}.post_attention_layernorm.weight",)),
)
OUTPUTS = (
    Rule("layers/{layer}/o/kernel", (f"{LAYER}.self_attn.o_proj.weight",), transposed),
    Rule("layers/{layer}/down/kernel", (f"{LAYER}.mlp.down_proj.weight",), transposed),
)
INPUTS = (
    Rule("layers/{layer}/q/kernel", (f"{LAYER}.self_attn.q_proj.weight",), transposed),
    Rule("layers/{layer}/k/kernel", (f"{LAYER}.self_attn.k_proj.weight",), transposed),
    Rule("layers/{layer}/v/kernel", (f"{LAYER}.self_attn.v_proj.weight",), transposed),
    Rule("layers/{layer}/gate/kernel", (f"{LAYER}.mlp.gate_proj.weight",), transposed),
    Rule("layers/{layer}/up/kernel", (f"{LAYER}.mlp.up_proj.weight",), transposed),
)
BIASES = (  # where the config has them
    Rule("layers/{layer}/q/bias", (f"{LAYER}.self_attn.q_proj.bias",)),
    Rule("layers/{layer}/k/bias", (f"{LAYER}.self_attn.k_proj.bias",)),
    Rule("layers/{layer}/v/bias", (f"{LAYER}.self_attn.v_proj.bias",)),
    Rule("layers/{layer}/o/bias", (f"{LAYER}.self_attn.o_proj.bias",)),
    Rule("layers/{layer}/gate/bias", (f"{LAYER}.mlp.gate_proj.bias",)),
    Rule("layers/{layer}/up/bias", (f"{LAYER}.mlp.up_proj.bias",)),
    Rule("layers/{layer}/down/bias", (f"{LAYER}.mlp.down_proj.bias",)),
)
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def names(config: DecoderConfig) -> Names:
    """The family's table."""
    return table(config, OUTSIDE + NORMS + INPUTS + OUTPUTS + BIASES)


def table(config: DecoderConfig, rules: tuple[Rule, ...]) -> Names:
    """A table of these rules; a copy of tied embeddings is not needed, nor are the buffers of old versions."""
    return Names(rules, ignore=BUFFERS + ((r"lm_head\.weight",) if config.tie_embeddings else ()))
