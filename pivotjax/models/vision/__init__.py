"""Vision encoders: images to visual features of one shape and one normalisation."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pivotjax.checkpoints import names
from pivotjax.checkpoints.pickles import read_state_dict
from pivotjax.errors import InputError
from pivotjax.files import sha256
from pivotjax.models.vision import efficientnet_lite
from pivotjax.models.vision.efficientnet_lite import EfficientNetLite

__all__ = ["FAMILIES", "Encoder", "encode", "load_encoder"]

_GRID = 4  # visual tokens on a side
_NORM_EPS = 1e-5


class Encoder(NamedTuple):
    """A frozen vision encoder: `nnx.merge(graphdef, params)` is the network."""

    name: str
    graphdef: nnx.GraphDef
    params: dict  # nested dict of float32 arrays
    image_size: int  # pixels on a side
    num_tokens: int  # visual tokens of one image
    dim: int  # channels of one visual token
    identity: str  # SHA-256 of the weight file


def load_encoder(path: Path) -> Encoder:
    """Loads the `.pth` state dict of an EfficientNet-Lite0.

    InputError if the file is missing, damaged, would run code, or is another network.
    """
    path = Path(path)
    tensors = read_state_dict(path)
    for marker, load in FAMILIES.items():
        if marker in tensors:
            graphdef, params, config = load(tensors, str(path))
            return Encoder(path.stem, graphdef, params, config.image_size, _GRID**2, config.head, sha256(path))
    raise InputError(f"{path} is no known vision encoder; give the torch state dict of an EfficientNet-Lite0")


def encode(encoder: Encoder, images: UInt8[Array, "B 224 224 3"]) -> Float[Array, "B 16 1280"]:
    """Visual features, float32: the last map pooled to 4x4 tokens (row by row), each normalised over its channels.

    The normalisation is a layer norm without parameters, the same for all domains. Compiled once a batch size.
    InputError if the images are not uint8 of the encoder's size.
    """
    side = encoder.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != jnp.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"the encoder takes images as uint8 [B, {side}, {side}, 3], not {found}; resize them first")
    return _encode(encoder.graphdef, encoder.params, images)


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, images):
    features = nnx.merge(graphdef, params).features(images)
    rows, columns = (jnp.asarray(_bins(size, _GRID)) for size in features.shape[1:3])
    pooled = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, features, precision="highest")
    tokens = pooled.reshape(len(images), _GRID**2, -1)
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _NORM_EPS)


def _bins(size: int, bins: int) -> np.ndarray:
    """Averaging matrix `[bins, size]` of adaptive pooling: bin i is floor(i*size/bins) .. ceil((i+1)*size/bins) - 1."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _load_efficientnet_lite(tensors: Mapping[str, np.ndarray], where: str):
    config = efficientnet_lite.LITE0
    module = nnx.eval_shape(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    shapes = nnx.to_pure_dict(state)
    params = names.load(tensors, efficientnet_lite.names(), shapes, where=where)
    return graphdef, params, config


# Keyed by a tensor name that only this family has: a state dict does not say what it is.
FAMILIES: dict[str, Callable] = {"_conv_stem.weight": _load_efficientnet_lite}
