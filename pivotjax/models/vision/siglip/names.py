"""SigLIP's tensor names. Written with `vision_model.`, which every transformers reads; 5.x leaves it out of towers."""

from pivotjax.checkpoints.names import Names
from pivotjax.models.vision.huggingface import rules
from pivotjax.models.vision.vit import VisionConfig

_ALIASES = ((r"^(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),)
_POSITION_IDS = r"vision_model\.embeddings\.position_ids"
_TEXT = (r"text_model\..*", r"logit_scale", r"logit_bias")


def names(config: VisionConfig) -> Names:
    """Of the image tower alone."""
    return Names(rules(config, "vision_model."), _ALIASES, (_POSITION_IDS,))


def whole_names(config: VisionConfig) -> Names:
    """Of the image tower within a whole SigLIP, whose text tower is left out."""
    return Names(rules(config, "vision_model."), _ALIASES, (_POSITION_IDS, *_TEXT))
