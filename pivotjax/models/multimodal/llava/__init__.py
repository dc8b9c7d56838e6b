"""LLaVA 1.5 and its kin (`model_type` "llava"): a tower, two linear layers, any language model."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.llava.config import config
from pivotjax.models.multimodal.llava.images import arrange, placeholder, process
from pivotjax.models.multimodal.llava.names import names
from pivotjax.models.processors import Processor

FAMILY = Family(config, names, arrange, process, placeholder, Processor)
