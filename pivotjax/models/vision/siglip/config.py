"""SigLIP's config.json: `siglip_vision_model` and `siglip` (SigLIP 2 of one image size too), and NaFlex's:
`siglip2_vision_model` and `siglip2`."""

import math
from collections.abc import Mapping
from typing import Any

from pivotjax.models.settings import Settings
from pivotjax.models.vision.huggingface import read_config
from pivotjax.models.vision.vit import VisionConfig

# What a config.json of the family means by leaving a field out.
DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of a tower alone; InputError for what is not supported."""
    return read_config(fields, where, DEFAULTS, pooling_head=_has_head(fields, where))


def whole_config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of the image tower of a whole SigLIP."""
    part = Settings(fields, where).part("vision_config")
    return config(part.fields, part.where)


def naflex_config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of a NaFlex tower alone: its `image_size` is that of the square whose patches are the table of positions."""
    settings = Settings({"num_patches": 256, "patch_size": DEFAULTS["patch_size"], **fields}, where)
    patches = settings.size("num_patches")
    side = math.isqrt(patches)
    if side**2 != patches:
        raise settings.unsupported("num_patches", "a table of positions needs a square number")
    square = dict(fields) | {"image_size": side * settings.size("patch_size")}
    return read_config(square, where, DEFAULTS, pooling_head=_has_head(fields, where), positions="interpolated")


def whole_naflex_config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """Of the image tower of a whole NaFlex SigLIP 2."""
    part = Settings(fields, where).part("vision_config")
    return naflex_config(part.fields, part.where)


def _has_head(fields: Mapping[str, Any], where: str) -> bool:
    return Settings({"vision_use_head": True, **fields}, where).flag("vision_use_head")
