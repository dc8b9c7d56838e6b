"""Tensor names of `Qwen3ForCausalLM`."""

from pivotjax.checkpoints.names import Names, Rule
from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.llama.names import BIASES, INPUTS, LAYER, NORMS, OUTPUTS, OUTSIDE, table

QK_NORMS = (
    Rule("layers/{layer}/q_norm/scale", (f"{LAYER}.self_attn.q_norm.weight",)),
    Rule("layers/{layer}/k_norm/scale", (f"{LAYER}.self_attn.k_norm.weight",)),
)


def names(config: DecoderConfig) -> Names:
    """The family's table."""
    return table(config, OUTSIDE + NORMS + QK_NORMS + INPUTS + OUTPUTS + BIASES)
