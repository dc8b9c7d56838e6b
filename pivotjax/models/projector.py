"""The projector: what stands between the frozen vision encoder and the frozen LLM, and all that is trained.

Parameters are a plain dict `{"linear_0": {"kernel": [d_in, d_out], "bias": [d_out]}, "linear_1": ...}`. K experts are
the same dict with a leading axis K on every leaf. Kinds follow LLaVA: `linear`, and `mlpNx_gelu` (N linear layers with
exact GELU between them). `pixel_shuffle2_linear`, `avg_pool2_mlp2x_gelu` and their like first make s x s features one,
without parameters: `connectors.reduce` does that to features (training, to those of the frozen encoder as they are
encoded), and what stands here is the linear layers behind it. A layer without `bias` has none.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pivotjax.errors import InputError

Params = dict[str, dict[str, jax.Array]]

# E[gelu(x)^2] for a standard normal x: keeps the output's spread where the initialisation wants it.
_GELU_SECOND_MOMENT = 0.4252


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector's shape."""

    kind: str = "mlp2x_gelu"
    """`linear` or `mlpNx_gelu` with N = 1, 2, 3, ...; before it `pixel_shuffleS_` or `avg_poolS_` to make S x S visual
    tokens one."""


class Kind(NamedTuple):
    """A projector's kind, taken apart."""

    reduction: str | None  # `pixel_shuffle`, `avg_pool`
    scale: int  # features on a side that become one
    depth: int  # linear layers


def parse(kind: str) -> Kind:
    """Takes the name of a kind apart; InputError if it is unknown."""
    found = re.fullmatch(r"(?:(pixel_shuffle|avg_pool)([2-9])_)?(?:linear|mlp([1-9])x_gelu)", kind)
    if not found:
        raise InputError(
            f"projector kind {kind!r} is unknown; use `linear` or `mlpNx_gelu` (N from 1 to 9), alone or after "
            "`pixel_shuffleS_` or `avg_poolS_` (S from 2 to 9)"
        )
    return Kind(found[1], int(found[2] or 1), int(found[3] or 1))


def depth(kind: str) -> int:
    """Number of linear layers of a projector kind."""
    return parse(kind).depth


def init(kind: str, d_in: int, d_out: int, key: jax.Array, output_std: float) -> Params:
    """W0: LeCun-normal kernels, zero biases; the last kernel scaled so that outputs have standard deviation
    `output_std` (the spread of the LLM's token embeddings) for inputs of unit variance. float32. `d_in` is the width of
    what the first linear layer sees (`connectors.width`)."""
    layers, params = depth(kind), {}
    keys = jax.random.split(key, layers)
    for i in range(layers):
        fan_in = d_in if i == 0 else d_out
        second_moment = 1.0 if i == 0 else _GELU_SECOND_MOMENT
        std = (output_std if i == layers - 1 else 1.0) / np.sqrt(fan_in * second_moment)
        kernel = std * jax.random.normal(keys[i], (fan_in, d_out), jnp.float32)
        params[f"linear_{i}"] = {"kernel": kernel, "bias": jnp.zeros((d_out,), jnp.float32)}
    return params


def stack(params: list[Params]) -> Params:
    """K projectors -> one dict with a leading axis K."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def unstack(params: Params) -> list[Params]:
    """Inverse of `stack`."""
    count = jax.tree.leaves(params)[0].shape[0]
    return [jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in range(count)]


def layer_inputs(params: Params, features: Float[Array, "*B d_in"]) -> dict[str, Float[Array, "*B d"]]:
    """What each linear layer sees, by layer name; the key `output` holds the projector's result."""
    seen, x = {}, features
    for i in range(len(params)):
        seen[f"linear_{i}"] = x
        layer = params[f"linear_{i}"]
        x = x @ layer["kernel"] + layer.get("bias", 0)
        if i < len(params) - 1:
            x = jax.nn.gelu(x, approximate=False)
    return seen | {"output": x}


def apply(params: Params, features: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
    """Visual features -> visual tokens in the LLM's input space, in the parameters' dtype."""
    return layer_inputs(params, features)["output"]


def apply_stacked(params: Params, features: Float[Array, "K *B d_in"]) -> Float[Array, "K *B d_out"]:
    """Projector k on features k."""
    return jax.vmap(apply)(params, features)


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes, dtypes and bytes; of W0 it is the `init_id` that siblings share."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
