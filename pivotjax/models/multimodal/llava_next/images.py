"""Where LLaVA-NeXT's images go: the whole image first, then its tiles put together, rows ended by `image_newline`."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Float, Int
from PIL.Image import Image as Picture

from pivotjax.errors import InputError
from pivotjax.models.multimodal.family import Images
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.templates import IMAGE
from pivotjax.models.processors import AnyResolutionProcessor, best_resolution

_NEWLINE = -1


def arrange(
    config: MultimodalConfig,
    pixel_values: Float[np.ndarray, "N tiles 3 H W"],
    image_sizes: Int[np.ndarray, "N 2"],
) -> Images:
    """All images of a batch, those of the first prompt first; tiles beyond an image's own are padding."""
    sizes = np.asarray(image_sizes).reshape(-1, 2).tolist()
    if pixel_values.ndim != 5 or len(pixel_values) != len(sizes):
        raise InputError(f"pixel_values must be [images, tiles, 3, height, width] and image_sizes [images, 2], not "
                         f"{list(pixel_values.shape)} and {list(np.shape(image_sizes))}")
    pixels, order, start = [], [], 0
    for image, size in zip(pixel_values, sizes):
        rows, columns = _grid(config, size)
        if len(image) <= rows * columns:
            raise InputError(f"an image of {size[0]} x {size[1]} pixels has {1 + rows * columns} tiles; "
                             f"pixel_values holds {len(image)}")
        pixels.append(image[: 1 + rows * columns])
        own = _tokens(config, size)
        order.append(np.where(own == _NEWLINE, _NEWLINE, own + start * config.image_tokens))
        start += 1 + rows * columns
    return Images(np.concatenate(pixels), np.concatenate(order))


def process(
    processor: AnyResolutionProcessor, samples: Sequence[Sequence[Picture]]
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """`pixel_values` [N, tiles, 3, H, W] and `image_sizes` [N, 2]; of each picture, its size."""
    arrays = processor(list(chain.from_iterable(samples)))
    return arrays, [{"size": tuple(size)} for size in arrays["image_sizes"].tolist()]


def placeholder(config: MultimodalConfig, size: tuple[int, int]) -> str:
    """The image token, repeated as often as a picture of this height and width asks for."""
    return IMAGE * len(_tokens(config, size))


def _grid(config: MultimodalConfig, size: tuple[int, int]) -> tuple[int, int]:
    height, width = best_resolution(size, config.grids)
    return height // config.vision.image_size, width // config.vision.image_size


def _tokens(config: MultimodalConfig, size: tuple[int, int]) -> Int[np.ndarray, " tokens"]:
    """Which visual tokens of its tiles an image of this height and width shows, in order; the whole is tile 0."""
    side, (rows, columns) = config.vision.side, _grid(config, size)
    tile = 1 + np.arange(rows * columns).reshape(rows, columns)
    patch = np.arange(side * side).reshape(side, side)
    mosaic = np.kron(tile, np.full((side, side), side * side)) + np.tile(patch, (rows, columns))
    kept = _without_padding(mosaic, size)
    lines = np.concatenate([kept, np.full((len(kept), 1), _NEWLINE)], axis=1)
    return np.concatenate([patch.ravel(), lines.ravel()])


def _without_padding(mosaic: Int[np.ndarray, "h w"], size: tuple[int, int]) -> Int[np.ndarray, "h w"]:
    """The part of a grid that the image covers: it was centred on it with its proportions kept.

    The rounding is that of the published models (`unpad_image`), or the numbers of tokens would differ.
    """
    (height, width), (rows, columns) = size, mosaic.shape
    if width / height > columns / rows:
        edge = (rows - int(round(height * (columns / width), 7))) // 2
        return mosaic[edge : rows - edge]
    edge = (columns - int(round(width * (rows / height), 7))) // 2
    return mosaic[:, edge : columns - edge]
