"""The image tower's part of Idefics3's and SmolVLM's config.json: `idefics3_vision`, `smolvlm_vision`."""

from collections.abc import Mapping
from typing import Any

from pivotjax.models.vision.huggingface import read_config
from pivotjax.models.vision.vit import VisionConfig

# What a config.json of the family means by leaving a field out.
DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 1152,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def config(fields: Mapping[str, Any], where: str) -> VisionConfig:
    """InputError for what is not supported."""
    return read_config(fields, where, DEFAULTS, positions="bucketed")
