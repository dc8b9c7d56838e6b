"""Tensor names of `Phi3ForCausalLM`."""

from pivotjax.checkpoints.names import Names, Rule, transposed
from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.llama.names import LAYER, NORMS, OUTPUTS, OUTSIDE, table

FUSED = (
    Rule("layers/{layer}/qkv/kernel", (f"{LAYER}.self_attn.qkv_proj.weight",), transposed),
    Rule("layers/{layer}/gate_up/kernel", (f"{LAYER}.mlp.gate_up_proj.weight",), transposed),
)


def names(config: DecoderConfig) -> Names:
    """The family's table."""
    return table(config, OUTSIDE + NORMS + FUSED + OUTPUTS)
