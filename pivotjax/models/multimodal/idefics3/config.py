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
    vision_type, tower = vision_part(settings, *_TOWERS)
    language_type, decoder = language_part(settings, settings.flag("tie_word_embeddings"))
    scale = settings.size("scale_factor")
    return MultimodalConfig(
        vision_type=_TOWERS[vision_type],
        vision=tower,
        language_type=language_type,
        language=decoder,
        connector="linear" if scale == 1 else f"pixel_shuffle{scale}_linear",
        connector_bias=False,
        depths=(tower.num_layers,),
        final_norm=True,
        image_token=settings.size("image_token_id"),
    )
