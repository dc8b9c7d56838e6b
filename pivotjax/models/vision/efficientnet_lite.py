"""EfficientNet-Lite: inverted residual blocks with ReLU6 and no squeeze-and-excite, for inference.

Architecture: Tan and Le 2019 (arXiv 1905.11946) in the Lite form of TensorFlow's release: TF "SAME" padding, BatchNorm
eps 1e-3, pixels as (x - 127) / 128. BatchNorm is folded into the convolution before it when weights are loaded.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pivotjax.checkpoints.names import Names, Rule, Transform, transposed

_NORM_EPS = 1e-3


@dataclass(frozen=True)
class Stage:
    """`repeats` blocks of one kind; the first has the stride and changes the channels."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Sizes of an EfficientNet-Lite."""

    stem: int
    stages: tuple[Stage, ...]
    head: int
    classes: int
    image_size: int


LITE0 = EfficientNetLiteConfig(
    stem=32,
    stages=(
        Stage(1, 3, 1, 1, 16),
        Stage(2, 3, 2, 6, 24),
        Stage(2, 5, 2, 6, 40),
        Stage(3, 3, 2, 6, 80),
        Stage(3, 5, 1, 6, 112),
        Stage(4, 5, 2, 6, 192),
        Stage(1, 3, 1, 6, 320),
    ),
    head=1280,
    classes=1000,
    image_size=224,
)


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

    def classify(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        """Logits of the ImageNet classes."""
        return self.classifier(self.features(images).mean((1, 2)))


def names() -> Names:
    """The names of the PyTorch release (`_blocks.N._expand_conv.weight` ...), BatchNorm folded on the way."""
    blocks = "_blocks.{block}."
    rules = [
        *_folded("stem", "_conv_stem", "_bn0", lambda weight: weight.transpose(2, 3, 1, 0)),
        *_folded("blocks/{block}/expand", f"{blocks}_expand_conv", f"{blocks}_bn0", _pointwise),
        *_folded("blocks/{block}/depthwise", f"{blocks}_depthwise_conv", f"{blocks}_bn1", _depthwise),
        *_folded("blocks/{block}/project", f"{blocks}_project_conv", f"{blocks}_bn2", _pointwise),
        *_folded("head", "_conv_head", "_bn1", _pointwise),
        Rule("classifier/kernel", ("_fc.weight",), transposed),
        Rule("classifier/bias", ("_fc.bias",)),
    ]
    return Names(tuple(rules), ignore=(r".*\.num_batches_tracked",))


def _folded(path: str, conv: str, norm: str, layout) -> list[Rule]:
    """A convolution and the BatchNorm after it: `kernel * s` and `beta - mean * s`, `s = gamma / sqrt(var + eps)`."""

    def scale(gamma, variance):
        return gamma / np.sqrt(variance + np.float32(_NORM_EPS))

    return [
        Rule(
            f"{path}/kernel",
            (f"{conv}.weight", f"{norm}.weight", f"{norm}.running_var"),
            Transform(lambda weight, gamma, variance: layout(weight) * scale(gamma, variance), None),
        ),
        Rule(
            f"{path}/bias",
            (f"{norm}.bias", f"{norm}.running_mean", f"{norm}.weight", f"{norm}.running_var"),
            Transform(lambda beta, mean, gamma, variance: beta - mean * scale(gamma, variance), None),
        ),
    ]


def _pointwise(weight: np.ndarray) -> np.ndarray:
    """`[out, in, 1, 1]` as `[in, out]`."""
    return weight[:, :, 0, 0].T


def _depthwise(weight: np.ndarray) -> np.ndarray:
    """`[channels, 1, h, w]` as `[h, w, channels]`."""
    return weight[:, 0].transpose(1, 2, 0)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TF "SAME" padding before and after: the odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
