"""config.json of Qwen3."""

from typing import Any

from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.qwen2.config import DEFAULTS as QWEN2
from pivotjax.models.language.sizes import decoder_config, settings_of, window_by_layer

DEFAULTS = QWEN2 | {"head_dim": 128}


def config(fields: dict[str, Any], where: str) -> DecoderConfig:
    """`attention_bias` is of all four projections; `head_dim` need not be `hidden_size / num_attention_heads`."""
    settings = settings_of(fields, where, DEFAULTS)
    bias = settings.flag("attention_bias")
    return decoder_config(settings, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=window_by_layer(settings))
