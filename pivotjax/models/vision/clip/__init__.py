"""CLIP's image towers: OpenAI's ViT-B/32 to ViT-L/14-336 and all of their shape."""

from pivotjax.models.vision.clip.config import config, whole_config
from pivotjax.models.vision.clip.names import names, whole_names
from pivotjax.models.vision.family import Family

FAMILY = Family(config, names)
WHOLE_FAMILY = Family(whole_config, whole_names)
