"""config.json of LLaVA-NeXT (`LlavaNextForConditionalGeneration`)."""

from collections.abc import Mapping
from typing import Any

from pivotjax.models.multimodal.llava.config import DEFAULTS, joined_config
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.settings import Settings

_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config(fields: Mapping[str, Any], where: str) -> MultimodalConfig:
    """`image_grid_pinpoints` are heights and widths, multiples of the tower's image size."""
    settings = Settings({**DEFAULTS, "image_grid_pinpoints": _GRIDS, **fields}, where)
    grids = settings.get("image_grid_pinpoints") or _GRIDS
    if not isinstance(grids, list) or not all(_is_pair(grid) for grid in grids):
        raise settings.unsupported("image_grid_pinpoints", "a list of [height, width]")
    found = joined_config(settings, settings.flag("tie_word_embeddings"), grids=tuple(map(tuple, grids)))
    size = found.vision.image_size
    if any(length % size for grid in grids for length in grid):
        raise settings.unsupported("image_grid_pinpoints", f"multiples of the tower's {size} pixels")
    if found.tower_tokens != found.vision.num_patches:
        raise settings.unsupported("vision_feature_select_strategy", "a tile must give one token a patch")
    return found


def _is_pair(grid: Any) -> bool:
    return isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
