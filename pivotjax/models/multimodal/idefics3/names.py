"""Tensor names of `Idefics3ForConditionalGeneration`; every version of transformers has had these."""

from pivotjax.checkpoints.names import Names
from pivotjax.models import connectors, language, vision
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import beginning, joined


def names(config: MultimodalConfig) -> Names:
    """The family's table."""
    decoder = language.FAMILIES[config.language_type].names(config.language)
    return joined(
        vision.FAMILIES[config.vision_type].names(config.vision).within("vision", "model.vision_model."),
        connectors.idefics3_names().within("projector", "model.connector."),
        beginning(decoder, model="model.text_model", lm_head="lm_head").within("language", ""),
    )
