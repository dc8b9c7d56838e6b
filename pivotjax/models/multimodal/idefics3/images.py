"""Where Idefics3's images go: an image is cut into tiles and shown whole after them, each with a tag before it."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float
from PIL.Image import Image as Picture

from pivotjax.errors import InputError
from pivotjax.models import connectors
from pivotjax.models.multimodal.family import Images
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.templates import IMAGE
from pivotjax.models.processors import TilingProcessor

_AROUND = "<fake_token_around_image>"


def arrange(
    config: MultimodalConfig,
    pixel_values: Float[np.ndarray, "B tiles 3 H W"],
    pixel_attention_mask: Bool[np.ndarray, "B tiles H W"] | None = None,
) -> Images:
    """All tiles of a batch; those that are zero everywhere are padding."""
    if pixel_values.ndim != 5:
        raise InputError(f"pixel_values must be [prompts, tiles, 3, height, width], not {list(pixel_values.shape)}")
    tiles = pixel_values.reshape(-1, *pixel_values.shape[2:])
    real = tiles.any((1, 2, 3))
    tiles, mask = tiles[real], None
    if pixel_attention_mask is not None:
        seen = np.asarray(pixel_attention_mask, bool)
        if seen.shape != pixel_values.shape[:2] + pixel_values.shape[3:]:
            raise InputError(f"pixel_attention_mask {list(seen.shape)} does not go with pixel_values "
                             f"{list(pixel_values.shape)}")
        mask = _of_patches(seen.reshape(-1, *seen.shape[2:])[real], config.vision.patch_size)
    patches = (tiles.shape[2] // config.vision.patch_size) * (tiles.shape[3] // config.vision.patch_size)
    return Images(tiles, np.arange(len(tiles) * connectors.num_tokens(config.connector, patches)), mask)


def _of_patches(mask: Bool[np.ndarray, "N H W"], size: int) -> Bool[np.ndarray, "N h w"]:
    """Patches that hold a pixel of the image."""
    rows, columns = mask.shape[1] // size, mask.shape[2] // size
    return mask[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size).any((2, 4))


def process(
    processor: TilingProcessor, samples: Sequence[Sequence[Picture]]
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """`pixel_values` [B, tiles, 3, H, W] and `pixel_attention_mask` [B, tiles, H, W]; of each picture, its tiles."""
    found = processor(samples)
    rows, cols = (list(chain.from_iterable(found.pop(name))) for name in ("rows", "cols"))
    return found, [{"rows": one, "cols": other} for one, other in zip(rows, cols)]


def placeholder(config: MultimodalConfig, rows: int, cols: int) -> str:
    """The tiles' tokens row by row, tagged `<row_1_col_1>` and so on, then the whole image's, tagged `<global-img>`."""
    tokens = IMAGE * config.image_tokens
    whole = f"{_AROUND}<global-img>{tokens}{_AROUND}"
    if not rows:
        return whole
    lines = (
        "".join(f"{_AROUND}<row_{row}_col_{col}>{tokens}" for col in range(1, cols + 1)) for row in range(1, rows + 1)
    )
    return "".join(f"{line}\n" for line in lines) + "\n" + whole
