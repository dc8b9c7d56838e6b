"""What makes a family of language models."""

from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx

from pivotjax.checkpoints.names import Names
from pivotjax.models.language.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class Family:
    """How a family of checkpoints becomes a network.

    Fields:
        config: sizes from the fields of config.json and the file's name for errors (of a GGUF file: from the file).
        names: the table of tensor names.
        module: the network, `module(config, dtype=, rngs=)`.
    """

    config: Callable[..., DecoderConfig]
    names: Callable[[DecoderConfig], Names]
    module: Callable[..., nnx.Module] = Decoder
