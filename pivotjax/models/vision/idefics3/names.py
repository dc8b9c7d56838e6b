"""The tensor names of Idefics3's and SmolVLM's image tower (in the whole model after `model.vision_model.`)."""

from pivotjax.checkpoints.names import Names
from pivotjax.models.vision.huggingface import rules
from pivotjax.models.vision.vit import VisionConfig


def names(config: VisionConfig) -> Names:
    """Of the tower alone."""
    return Names(rules(config, ""))
