"""Tensor names of `LlavaForConditionalGeneration`.

Written as transformers before 4.52 had them in memory, which every later version reads: `language_model.model.`,
`multi_modal_projector.`, `vision_tower.vision_model.`. Read also as newer ones have them in memory (`model.` before
all, `lm_head` outside) and as 5.x writes them (`vision_tower.` without `vision_model.`).
"""

from pivotjax.checkpoints.names import Names
from pivotjax.models import connectors, language, vision
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import joined

ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
)


def names(config: MultimodalConfig) -> Names:
    """The family's table."""
    return joined(
        vision.FAMILIES[config.vision_type].names(config.vision).within("vision", "vision_tower."),
        connectors.llava_names(config.connector, config.connector_bias).within("projector", "multi_modal_projector."),
        language.FAMILIES[config.language_type].names(config.language).within("language", "language_model."),
        aliases=ALIASES,
    )
