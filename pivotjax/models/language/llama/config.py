"""config.json of the Llama family."""

from typing import Any

from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.sizes import decoder_config, settings_of

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=2048,
)  # fmt: skip


def config(fields: dict[str, Any], where: str) -> DecoderConfig:
    """`attention_bias` is of all four projections, `mlp_bias` of all three."""
    settings = settings_of(fields, where, DEFAULTS)
    attention, mlp = settings.flag("attention_bias"), settings.flag("mlp_bias")
    return decoder_config(settings, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)
