"""CLIP's config.json: `clip_vision_model` (the tower alone) and `clip` (both towers)."""

from collections.abc import Mapping
from typing import Any

from pivotjax.models.settings import Settings
from pivotjax.models.vision.huggingface import read_config
from pivotjax.models.vision.vit import VisionConfig

# What a config.json of the family means by leaving a field out.
DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of a tower alone; InputError for what is not supported."""
    return read_config(fields, where, DEFAULTS, has_class_token=True, pre_norm=True, patch_bias=False)


def whole_config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of the image tower of a whole CLIP; the early `vision_config_dict` overrides `vision_config`."""
    settings = Settings(fields, where)
    parts = [settings.part(name) for name in ("vision_config", "vision_config_dict")]
    return config({**parts[0].fields, **parts[1].fields}, parts[0].where)
