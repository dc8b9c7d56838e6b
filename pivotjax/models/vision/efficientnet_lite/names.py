"""The tensor names of EfficientNet-Lite's PyTorch release. Its norms are folded: it is read, not written."""

from collections.abc import Callable

import numpy as np

from pivotjax.checkpoints.names import Names, Rule, Transform, transposed

_NORM_EPS = 1e-3


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


def _folded(path: str, conv: str, norm: str, layout: Callable) -> list[Rule]:
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
