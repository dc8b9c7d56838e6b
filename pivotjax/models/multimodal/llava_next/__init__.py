"""LLaVA-NeXT (`model_type` "llava_next"): LLaVA that sees an image whole and in tiles."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.llava_next.config import config
from pivotjax.models.multimodal.llava_next.images import arrange, placeholder, process
from pivotjax.models.multimodal.llava_next.names import names

FAMILY = Family(config, names, arrange, process, placeholder, inputs=("image_sizes",))
