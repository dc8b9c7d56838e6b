"""The image towers of Idefics3 and SmolVLM: SigLIP for images of any size."""

from pivotjax.models.vision.family import Family
from pivotjax.models.vision.idefics3.config import config
from pivotjax.models.vision.idefics3.names import names

FAMILY = Family(config, names)
