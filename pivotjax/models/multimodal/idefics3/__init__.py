"""Idefics3 and SmolVLM (`model_type` "idefics3", "smolvlm"): a tower for any size, pixel shuffle, Llama."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.idefics3.config import config
from pivotjax.models.multimodal.idefics3.images import arrange, placeholder, process
from pivotjax.models.multimodal.idefics3.names import names
from pivotjax.models.processors import TilingProcessor

FAMILY = Family(config, names, arrange, process, placeholder, TilingProcessor, ("pixel_attention_mask",))
