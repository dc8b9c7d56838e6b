"""What makes a family of whole multimodal models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from PIL.Image import Image as Picture

from pivotjax.checkpoints.names import Names
from pivotjax.models.multimodal.network import Multimodal, MultimodalConfig


class Images(NamedTuple):
    """The images of a batch, ready for the network.

    Fields:
        pixels: every image, or every tile of one, that the tower sees.
        order: which visual tokens, in which order, stand where the prompts have image tokens, row by row: numbers of
            the projector's tokens over all of `pixels`; -1 is `image_newline`.
        patch_mask: which patches are no padding; None: all.
    """

    pixels: Float[np.ndarray, "N 3 H W"]
    order: Int[np.ndarray, " tokens"]
    patch_mask: Bool[np.ndarray, "N h w"] | None = None


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints becomes a network, and its images the network's input.

    Fields:
        config: from the fields of config.json and the file's name for errors.
        names: the table of tensor names.
        arrange: `arrange(config, pixel_values, **inputs)`, arrays as transformers' processor of the family makes them.
        process: `process(processor, samples)`: the arrays that `arrange` takes of the pictures of each prompt, and what
            `placeholder` has to know about each picture, in their order.
        placeholder: `placeholder(config, **known)`: what stands in the prompt's text for one picture.
        processor: of its images.
        inputs: the arrays beside `pixel_values`.
        module: the network, `module(config, dtype=, rngs=)`.
    """

    config: Callable[[Mapping[str, Any], str], MultimodalConfig]
    names: Callable[[MultimodalConfig], Names]
    arrange: Callable[..., Images]
    process: Callable[[Any, Sequence[Sequence[Picture]]], tuple[dict[str, np.ndarray], list[dict[str, Any]]]]
    placeholder: Callable[..., str]
    processor: type | None = None
    inputs: tuple[str, ...] = ()
    module: Callable[..., nnx.Module] = Multimodal
