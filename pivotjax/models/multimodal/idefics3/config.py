"""config.json of Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`)."""

from collections.abc import Mapping
from typing import Any

from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import language_part, vision_part
from pivotjax.models.settings import Settings

# Early checkpoints name the tower's type as the whole model's.
_TOWERS = {"idefics3_vision": "idefics3_vision", "smolvlm_vision": "smolvlm_vision", "idefics3": "idefics3_vision",
           "smolvlm": "smolvlm_vision"}  # fmt: skip


def config(fields: Mapping[str, Any], where: str) -> MultimodalConfig:
    """`scale_factor` squared neighbours of the tower's tokens become one."""
    settings = Settings({"image_token_id": 128257, "scale_factor": 2, **fields}, where)
    tower, scale = vision_part(settings, _TOWERS), settings.size("scale_factor")
    return MultimodalConfig(
        **language_part(settings, settings.flag("tie_word_embeddings")),
        **tower,
        image_token=settings.size("image_token_id"),
        depths=(tower["vision"].num_layers,),
        connector="linear" if scale == 1 else f"pixel_shuffle{scale}_linear",
        connector_bias=False,
        final_norm=True,
    )
