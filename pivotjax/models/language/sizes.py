"""What the families' config.json have in common: transformers' names of a decoder's sizes."""

from collections.abc import Mapping
from typing import Any

from pivotjax.errors import InputError
from pivotjax.models.language.decoder import NO_WINDOW, DecoderConfig
from pivotjax.models.language.rope import KINDS, read_rope
from pivotjax.models.settings import Settings

# What a field means that config.json leaves out, where families do not differ (as transformers' config classes).
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_MOST_LAYERS = 4096


def settings_of(fields: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> Settings:
    """The fields of a config.json over a family's defaults. InputError if the weights are quantised."""
    if Settings(fields, where).get("quantization_config"):
        raise InputError(f"{where}: its weights are quantised (quantization_config); give the original model")
    return Settings({**_DEFAULTS, **defaults, **fields}, where)


def decoder_config(
    settings: Settings,
    *,
    rope_kinds: Mapping[str, str] = KINDS,
    partial_rotary: bool = False,
    windows: tuple[int, ...] = (),
    **parts: bool,
) -> DecoderConfig:
    """The config of a decoder whose sizes bear transformers' names; `parts` are the fields that a family adds.

    InputError if a field is missing, wrong, or asks for what is not supported.
    """
    settings.one_of("hidden_act", "silu", "swish")
    dim, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    kv_heads = settings.size_or_none("num_key_value_heads") or heads
    if heads % kv_heads:
        raise settings.unsupported("num_key_value_heads", f"it must divide the {heads} num_attention_heads")
    head_dim = settings.size_or_none("head_dim") or dim // heads
    rope, max_length = read_rope(settings, head_dim, rope_kinds, partial_rotary)
    return DecoderConfig(
        vocab_size=settings.size("vocab_size"),
        dim=dim,
        num_layers=settings.size("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=settings.size("intermediate_size"),
        rope=rope,
        norm_eps=settings.number("rms_norm_eps"),
        tie_embeddings=settings.flag("tie_word_embeddings"),
        max_length=max_length,
        windows=windows,
        **parts,
    )


def same_window(settings: Settings) -> tuple[int, ...]:
    """`sliding_window` in every layer (Mistral, Phi-3); null: none."""
    window = settings.size_or_none("sliding_window")
    return () if window is None else (window,) * settings.size("num_hidden_layers", most=_MOST_LAYERS)


def window_by_layer(settings: Settings) -> tuple[int, ...]:
    """`sliding_window` in the layers of `layer_types`, or from `max_window_layers` on (Qwen2, Qwen3)."""
    layers = settings.size("num_hidden_layers", most=_MOST_LAYERS)
    window = settings.size_or_none("sliding_window") if settings.flag("use_sliding_window") else None
    kinds = settings.get("layer_types")
    if kinds is None:
        first = settings.size("max_window_layers", least=0)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        needed = " or ".join(known)
        raise settings.unsupported("layer_types", f"a list of {layers}, each {needed}, goes with the other fields")
    if "sliding_attention" not in kinds:
        return ()
    return tuple(window if kind == "sliding_attention" else NO_WINDOW for kind in kinds)
