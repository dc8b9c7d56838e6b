"""Tensor names of `LlavaNextForConditionalGeneration`: LLaVA's, and `image_newline`."""

from pivotjax.checkpoints.names import Names, Rule
from pivotjax.models.multimodal.llava.names import names as llava_names
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import joined


def names(config: MultimodalConfig) -> Names:
    """The family's table."""
    return joined(llava_names(config), rules=(Rule("image_newline", ("image_newline",)),))
