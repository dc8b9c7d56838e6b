"""config.json of Mistral."""

from typing import Any

from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.sizes import decoder_config, same_window, settings_of

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096,
)  # fmt: skip


def config(fields: dict[str, Any], where: str) -> DecoderConfig:
    """`sliding_window` null (from version 0.2 on) means none; left out, it means 4096."""
    settings = settings_of(fields, where, DEFAULTS)
    return decoder_config(settings, windows=same_window(settings))
