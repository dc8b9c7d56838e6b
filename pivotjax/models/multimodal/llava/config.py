"""config.json of LLaVA 1.5 and its kin (`LlavaForConditionalGeneration`)."""

from collections.abc import Mapping
from typing import Any

from pivotjax.errors import InputError
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import language_part, vision_part
from pivotjax.models.settings import Settings

TOWERS = {"clip_vision_model": "clip_vision_model", "siglip_vision_model": "siglip_vision_model"}
DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "mm_projector_type": "mlp2x_gelu",  # another one comes from the LLaVA repository's layout
}


def config(fields: Mapping[str, Any], where: str) -> MultimodalConfig:
    """Embeddings are tied where the model or its text model says so."""
    settings = Settings({**DEFAULTS, **fields}, where)
    tied = settings.flag("tie_word_embeddings") or settings.part("text_config").flag("tie_word_embeddings")
    return joined_config(settings, tied)


def joined_config(settings: Settings, tied: bool, **parts: Any) -> MultimodalConfig:
    """The config from fields that LLaVA and LLaVA-NeXT share."""
    tower = vision_part(settings, TOWERS)
    drop_first = settings.one_of("vision_feature_select_strategy", "default", "full") == "default"
    settings.one_of("projector_hidden_act", "gelu")
    token = "image_token_index" if settings.get("image_token_id") is None else "image_token_id"
    return MultimodalConfig(
        **language_part(settings, tied),
        **tower,
        image_token=settings.size(token),
        depths=_depths(settings, tower["vision"].num_layers),
        connector=settings.get("mm_projector_type"),
        connector_bias=settings.flag("multimodal_projector_bias"),
        drop_first=drop_first,
        **parts,
    )


def _depths(settings: Settings, layers: int) -> tuple[int, ...]:
    """`vision_feature_layer`: a number or several; 0 is the embedding, -1 the last layer, as in `hidden_states`."""
    given = settings.get("vision_feature_layer")
    chosen = given if isinstance(given, list) else [given]
    if not chosen or not all(type(one) is int and -layers - 1 <= one <= layers for one in chosen):
        raise InputError(f"{settings.where}: vision_feature_layer {given!r} names no hidden states of a tower of "
                         f"{layers} layers; get the model's config.json again")
    return tuple(one if one >= 0 else one + layers + 1 for one in chosen)
