"""LLaVA-NeXT (`model_type` "llava_next"): LLaVA that sees an image whole and in tiles."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.llava_next.config import config
from pivotjax.models.multimodal.llava_next.images import arrange, placeholder, process
from pivotjax.models.multimodal.llava_next.names import names
from pivotjax.models.processors import AnyResolutionProcessor

FAMILY = Family(config, names, arrange, process, placeholder, AnyResolutionProcessor, ("image_sizes",))
