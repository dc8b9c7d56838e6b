"""Idefics3 and SmolVLM (`model_type` "idefics3", "smolvlm"): a tower for any size, pixel shuffle, Llama."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.idefics3.config import config
from pivotjax.models.multimodal.idefics3.images import arrange, placeholder, process
from pivotjax.models.multimodal.idefics3.names import names

FAMILY = Family(config, names, arrange, process, placeholder, inputs=("pixel_attention_mask",))
