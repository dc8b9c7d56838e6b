"""Tensor names of `MistralForCausalLM`."""

from pivotjax.checkpoints.names import Names
from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.llama.names import INPUTS, NORMS, OUTPUTS, OUTSIDE, table


def names(config: DecoderConfig) -> Names:
    """The family's table."""
    return table(config, OUTSIDE + NORMS + INPUTS + OUTPUTS)
