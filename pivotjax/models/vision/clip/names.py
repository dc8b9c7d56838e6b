"""CLIP's tensor names. Written with `vision_model.`, which every transformers reads; 5.x leaves it out of towers."""

from pivotjax.checkpoints.names import Names
from pivotjax.models.vision.huggingface import rules
from pivotjax.models.vision.vit import VisionConfig

_ALIASES = ((r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_model.\1."),)
_POSITION_IDS = r"vision_model\.embeddings\.position_ids"
_PROJECTION = r"visual_projection\.weight"
_TEXT = (r"text_model\..*", r"text_projection\.weight", r"logit_scale")


def names(config: VisionConfig) -> Names:
    """Of the image tower alone; a projection to the space shared with texts may be there and is left out."""
    return Names(rules(config, "vision_model."), _ALIASES, (_POSITION_IDS, _PROJECTION))


def whole_names(config: VisionConfig) -> Names:
    """Of the image tower within a whole CLIP, whose text tower is left out."""
    return Names(rules(config, "vision_model."), _ALIASES, (_POSITION_IDS, _PROJECTION, *_TEXT))
