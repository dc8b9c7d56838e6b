"""config.json of Phi-3."""

from typing import Any

from pivotjax.models.language.decoder import DecoderConfig
from pivotjax.models.language.sizes import decoder_config, same_window, settings_of

DEFAULTS = dict(
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5,
)  # fmt: skip
ROPE_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # old words: new


def config(fields: dict[str, Any], where: str) -> DecoderConfig:
    """`partial_rotary_factor` of each head turns; longrope by `original_max_position_embeddings`."""
    settings = settings_of(fields, where, DEFAULTS)
    windows = same_window(settings)
    return decoder_config(settings, rope_kinds=ROPE_KINDS, partial_rotary=True, windows=windows, fused=True)
