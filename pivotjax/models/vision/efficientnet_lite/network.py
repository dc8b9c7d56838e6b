"""EfficientNet-Lite: inverted residual blocks with ReLU6 and no squeeze-and-excite, for inference.

Architecture: Tan and Le 2019 (arXiv 1905.11946) in the Lite form of TensorFlow's release: TF "SAME" padding, BatchNorm
eps 1e-3, pixels as (x - 127) / 128. BatchNorm is folded into the convolution before it when weights are loaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pivotjax.models.vision.efficientnet_lite.config import EfficientNetLiteConfig, Stage

_GRID = 4  # visual tokens on a side
NUM_TOKENS = _GRID**2
_NORM_EPS = 1e-5


class Pointwise(nnx.Module):
    """1x1 convolution with a bias: a matrix product over channels."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out)) * d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((d_out,)))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return jnp.einsum("bhwc,cd->bhwd", x, self.kernel[...]) + self.bias[...]


class Depthwise(nnx.Module):
    """Depthwise convolution with a bias, TF "SAME" padding, as a sum of shifted products.

    XLA:CPU runs a grouped convolution several times slower than this sum, which it fuses into one loop.
    """

    def __init__(self, channels: int, size: int, stride: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size, channels)) / size)
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.stride = stride

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        kernel, stride = self.kernel[...], self.stride
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        x = jnp.pad(x, ((0, 0), _same(height, size, stride), _same(width, size, stride), (0, 0)))
        rows, columns = -(-height // stride), -(-width // stride)
        total = self.bias[...]
        for i in range(size):
            for j in range(size):
                total = total + kernel[i, j] * x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        return total


class Stem(nnx.Module):
    """The first convolution: 3x3, stride 2, on three channels."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3, 3, channels)) * 27**-0.5)
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, self.kernel[...], (2, 2), "SAME", dimension_numbers=layout)
        return y + self.bias[...]


class Block(nnx.Module):
    """Inverted residual: expand (unless by 1), depthwise, project; added to the input where the shapes agree."""

    def __init__(self, d_in: int, stage: Stage, stride: int, rngs: nnx.Rngs):
        width = d_in * stage.expand
        self.residual = stride == 1 and d_in == stage.channels
        self.expands = stage.expand > 1
        if self.expands:
            self.expand = Pointwise(d_in, width, rngs)
        self.depthwise = Depthwise(width, stage.kernel, stride, rngs)
        self.project = Pointwise(width, stage.channels, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = jax.nn.relu6(self.expand(x)) if self.expands else x
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
    """The network in float32; `features` is the map before pooling, `classify` the ImageNet logits."""

    def __init__(self, config: EfficientNetLiteConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = Stem(config.stem, rngs)
        blocks, channels = [], config.stem
        for stage in config.stages:
            for repeat in range(stage.repeats):
                blocks.append(Block(channels, stage, stage.stride if repeat == 0 else 1, rngs))
                channels = stage.channels
        self.blocks = nnx.List(blocks)
        self.head = Pointwise(channels, config.head, rngs)
        self.classifier = nnx.Linear(config.head, config.classes, rngs=rngs)

    def features(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w head"]:
        """The last map, 1/32 of the image's size, float32."""
        x = (images.astype(jnp.float32) - 127.0) / 128.0
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu6(self.head(x))

    def tokens(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 16 head"]:
        """The last map pooled to 4 x 4 tokens (row by row), each normalised over its channels: a layer norm without
        parameters, the same for all domains."""
        features = self.features(images)
        rows, columns = (jnp.asarray(_bins(size, _GRID)) for size in features.shape[1:3])
        pooled = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, features, precision="highest")
        tokens = pooled.reshape(len(images), NUM_TOKENS, -1)
        centred = tokens - tokens.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _NORM_EPS)

    def classify(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        """Logits of the ImageNet classes."""
        return self.classifier(self.features(images).mean((1, 2)))


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TF "SAME" padding before and after: the odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _bins(size: int, bins: int) -> np.ndarray:
    """Averaging matrix `[bins, size]` of adaptive pooling: bin i is floor(i*size/bins) .. ceil((i+1)*size/bins) - 1."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
