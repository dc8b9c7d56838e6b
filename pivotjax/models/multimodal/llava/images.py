"""Where LLaVA's images go: each becomes as many tokens as the tower gives."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float
from PIL.Image import Image as Picture

from pivotjax.errors import InputError
from pivotjax.models.multimodal.family import Images
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.templates import IMAGE
from pivotjax.models.processors import Processor


def arrange(config: MultimodalConfig, pixel_values: Float[np.ndarray, "N 3 H W"]) -> Images:
    """All images of a batch, those of the first prompt first."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise InputError(f"pixel_values must be [images, 3, height, width], not {list(pixel_values.shape)}")
    return Images(pixel_values, np.arange(len(pixel_values) * config.image_tokens))


def process(processor: Processor, samples: Sequence[Sequence[Picture]]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """`pixel_values` [N, 3, H, W]; nothing more is to know about a picture."""
    pictures = list(chain.from_iterable(samples))
    return processor(pictures), [{}] * len(pictures)


def placeholder(config: MultimodalConfig) -> str:
    """The image token, repeated."""
    return IMAGE * config.image_tokens
