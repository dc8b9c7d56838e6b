"""What makes a family of vision encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from pivotjax.checkpoints.names import Names
from pivotjax.models.vision.vit import VisionTransformer


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints becomes a network.

    Fields:
        config: sizes from the fields of config.json and the file's name for errors.
        names: the table of tensor names.
        module: the network, `module(config, dtype=, rngs=)`.
    """

    config: Callable[..., Any]
    names: Callable[[Any], Names]
    module: Callable[..., nnx.Module] = VisionTransformer
