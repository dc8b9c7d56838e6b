"""Connectors: what comes before a projector's linear layers, and all of their names in Hugging Face's models.

The spatial reductions have no parameters. `pixel_shuffle` (Idefics3, SmolVLM) lays the channels of s x s neighbouring
visual tokens side by side; `avg_pool` takes their mean.
"""

import math

from jaxtyping import Array, Float

from pivotjax.checkpoints.names import Names, Rule, transposed
from pivotjax.errors import InputError
from pivotjax.models import projector


def spatial(kind: str) -> str:
    """The kind with the same spatial reduction and one linear layer: kinds that agree in it take the same features."""
    parsed = projector.parse(kind)
    return f"{parsed.reduction}{parsed.scale}_linear" if parsed.reduction else "linear"


def num_tokens(kind: str, tokens: int) -> int:
    """Visual tokens that a projector of this kind makes of `tokens`; InputError if they are no square grid, or one
    that cannot be cut into s x s pieces."""
    parsed = projector.parse(kind)
    side = math.isqrt(tokens)
    if parsed.reduction and (side**2 != tokens or side % parsed.scale):
        scale = parsed.scale
        raise InputError(
            f"projector kind {kind!r} makes {scale} x {scale} visual tokens one; {tokens} tokens are no square grid "
            f"with a side that {scale} divides; choose another kind or another encoder (without its class token)"
        )
    return tokens // parsed.scale**2


def width(kind: str, dim: int) -> int:
    """Channels that the first linear layer sees, where visual tokens have `dim`."""
    parsed = projector.parse(kind)
    return dim * parsed.scale**2 if parsed.reduction == "pixel_shuffle" else dim


def reduce(kind: str, features: Float[Array, "*B T D"]) -> Float[Array, "*B t d"]:
    """The spatial reduction of a kind: a square grid of visual tokens, row by row, to a smaller one.

    `pixel_shuffle`: a new token holds the old ones of its square one after the other, row by row. Other kinds than the
    two change nothing.
    """
    parsed = projector.parse(kind)
    if not parsed.reduction:
        return features
    *batch, tokens, dim = features.shape
    count, scale = num_tokens(kind, tokens), parsed.scale
    side = math.isqrt(count)
    squares = features.reshape(*batch, side, scale, side, scale, dim).swapaxes(-4, -3)  # ..., row, column, s, s, dim
    if parsed.reduction == "avg_pool":
        return squares.mean((-3, -2)).reshape(*batch, count, dim)
    return squares.reshape(*batch, count, scale**2 * dim)


def apply(kind: str, params: projector.Params, features: Float[Array, "*B T D"]) -> Float[Array, "*B t d_out"]:
    """The whole connector: features of the vision tower -> visual tokens in the LLM's input space."""
    return projector.apply(params, reduce(kind, features))


def llava_names(kind: str, bias: bool = True) -> Names:
    """The linear layers in transformers' LLaVA: `linear_1`, `linear_2`, ... (after `multi_modal_projector.`)."""
    return Names(tuple(rule for i in range(projector.depth(kind)) for rule in _linear(i, f"linear_{i + 1}", bias)))


def idefics3_names() -> Names:
    """The one linear layer of Idefics3 and SmolVLM (after `model.connector.`), which has no bias."""
    return Names(tuple(_linear(0, "modality_projection.proj", bias=False)))


def _linear(number: int, key: str, bias: bool) -> list[Rule]:
    kernel = Rule(f"linear_{number}/kernel", (f"{key}.weight",), transposed)
    return [kernel, Rule(f"linear_{number}/bias", (f"{key}.bias",))] if bias else [kernel]
