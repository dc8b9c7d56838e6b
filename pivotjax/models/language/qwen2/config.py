"""config.json of Qwen2."""

from typing import Any

from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.sizes import decoder_config, settings_of, window_by_layer

DEFAULTS = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28,
)  # fmt: skip


def config(fields: dict[str, Any], where: str) -> DecoderConfig:
    """Queries, keys and values always have a bias; `sliding_window` counts only with `use_sliding_window`."""
    settings = settings_of(fields, where, DEFAULTS)
    return decoder_config(settings, qkv_bias=True, windows=window_by_layer(settings))
