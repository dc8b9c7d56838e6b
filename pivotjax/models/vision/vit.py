"""A vision transformer: one network for CLIP, SigLIP, SigLIP 2 and the towers of Idefics3 and SmolVLM.

The layers' weights are stacked on a leading axis and scanned. Architecture: Dosovitskiy et al. 2020 (arXiv 2010.11929)
as in CLIP (Radford et al. 2021, 2103.00020: class token, a norm before the first layer, no bias in the patch embedding)
and SigLIP (Zhai et al. 2023, 2303.15343: neither). Variable sizes: positions by buckets of the relative coordinate
(Idefics2 and 3, after NaViT, 2307.06304), or interpolated to the image's grid (SigLIP 2 NaFlex, 2502.14786).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pivotjax.errors import InputError


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


# By the name in config.json's `hidden_act`.
ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu, "gelu_pytorch_tanh": jax.nn.gelu}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and variant of a vision transformer."""

    image_size: int  # pixels on a side that the table of positions was made for
    patch_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    has_class_token: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    pooling_head: bool = False  # parameters that checkpoints carry; no visual token depends on them
    positions: Literal["learned", "bucketed", "interpolated"] = "learned"

    @property
    def side(self) -> int:
        """Patches on a side; what is left of the image at its right and bottom edge is not seen."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image of `image_size`."""
        return self.side**2


def _norm(config: VisionConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm, computed in float32."""
    kind = dict(dtype=dtype, param_dtype=dtype, use_fast_variance=False)
    return nnx.LayerNorm(config.dim, epsilon=config.norm_eps, **kind, rngs=rngs)


def _linear(d_in: int, d_out: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Layer(nnx.Module):
    """Attention and MLP, each added to its input, each behind a norm."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.config = config
        self.norm1, self.norm2 = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.q, self.k, self.v, self.o = (_linear(config.dim, config.dim, dtype, rngs) for _ in range(4))
        self.fc1 = _linear(config.dim, config.mlp_dim, dtype, rngs)
        self.fc2 = _linear(config.mlp_dim, config.dim, dtype, rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"] | None) -> Float[Array, "B T D"]:
        """`mask` says which tokens are seen."""
        y = self.norm1(x)
        q, k, v = (part(y).reshape(*y.shape[:2], self.config.num_heads, -1) for part in (self.q, self.k, self.v))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)  # softmax in float32
        x = x + self.o(mixed.reshape(y.shape))
        return x + self.fc2(ACTIVATIONS[self.config.activation](self.fc1(self.norm2(x))))


class PoolingHead(nnx.Module):
    """The parameters of SigLIP's attention pooling, kept so that a checkpoint can be written back whole."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.probe = nnx.Param(jnp.zeros((1, 1, config.dim), dtype))
        self.in_proj = _linear(config.dim, 3 * config.dim, dtype, rngs)  # query, key and value
        self.out_proj = _linear(config.dim, config.dim, dtype, rngs)
        self.norm = _norm(config, dtype, rngs)
        self.fc1 = _linear(config.dim, config.mlp_dim, dtype, rngs)
        self.fc2 = _linear(config.mlp_dim, config.dim, dtype, rngs)


class VisionTransformer(nnx.Module):
    """The network; parameters and compute in `dtype`, norms and softmax in float32."""

    def __init__(self, config: VisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config

        def normal(*shape):
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

        self.patch_kernel = normal(config.patch_size, config.patch_size, 3, config.dim)
        if config.patch_bias:
            self.patch_bias = nnx.Param(jnp.zeros((config.dim,), dtype))
        self.positions = normal(config.num_patches + config.has_class_token, config.dim)
        if config.has_class_token:
            self.class_token = normal(config.dim)
        if config.pre_norm:
            self.pre_norm = _norm(config, dtype, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Layer(config, dtype=dtype, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = _norm(config, dtype, rngs)
        if config.pooling_head:
            self.head = PoolingHead(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"] | Float[Array, "B T patch"],
        patch_mask: Bool[Array, "B h w"] | None = None,
        grid: Int[Array, "B 2"] | None = None,
        depth: int | None = None,
        place: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> Float[Array, "B T D"]:
        """Hidden states after `depth` layers (None: all), before the final norm; a class token comes first.

        Args:
            pixels: normalised images, channels last. For interpolated positions also patches, each as its rows of
                pixels, in the order of the image's `grid`, zeros after them.
            patch_mask: with bucketed positions, where an image has patches, beginning at its upper left corner; the
                rest is padding, which no patch sees. None: everywhere.
            grid: rows and columns of patches of each image, where `pixels` are patches.
            depth: only so many layers run; 0 gives the embedding (behind CLIP's first norm).
            place: what is done to the hidden states between layers: says where they live on a mesh.

        InputError if the images have another size than the learned positions.
        """
        config = self.config
        x, shape = self._embedded(pixels)
        if config.positions == "learned" and shape != (config.side, config.side):
            found, side = list(pixels.shape[1:3]), config.image_size
            raise InputError(f"the vision tower takes images of {side} x {side} pixels, not {found}; resize them first")
        mask = None
        if config.positions == "learned":
            table = self.positions[...]
            x = x + table[len(table) - config.num_patches :]
        elif config.positions == "bucketed":
            patch_mask = jnp.ones((len(x), *shape), bool) if patch_mask is None else patch_mask
            x = x + self.positions[...][_buckets(patch_mask, config.side)]
            mask = patch_mask.reshape(len(x), 1, 1, -1)
        else:
            grid = jnp.full((len(x), 2), jnp.array(shape)) if grid is None else grid
            x = x + _interpolated(self.positions[...], grid, x.shape[1], config.side)
            mask = (jnp.arange(x.shape[1]) < grid.prod(-1, keepdims=True))[:, None, None]
        if config.has_class_token:
            first = self.class_token[...] + self.positions[0]
            x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, config.dim)), x], axis=1)
        if config.pre_norm:
            x = self.pre_norm(x)
        return self._through_layers(x, mask, config.num_layers if depth is None else depth, place)

    def _embedded(self, pixels: jax.Array) -> tuple[Float[Array, "B T D"], tuple[int, int] | None]:
        """Patches as vectors, row by row, and how many rows and columns the images have."""
        kernel = self.patch_kernel[...]
        pixels, shape, p = pixels.astype(kernel.dtype), None, self.config.patch_size
        if pixels.ndim == 4:
            rows, columns = shape = (pixels.shape[1] // p, pixels.shape[2] // p)
            pixels = pixels[:, : rows * p, : columns * p].reshape(-1, rows, p, columns, p, 3)
            pixels = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, p * p * 3)
        x = pixels @ kernel.reshape(-1, self.config.dim)
        return x + self.patch_bias[...] if self.config.patch_bias else x, shape

    def _through_layers(self, x: jax.Array, mask: jax.Array | None, depth: int, place: Callable) -> jax.Array:
        graphdef, stacked = nnx.split(self.layers)

        def layer(x, number):  # weights are taken one layer at a time: cutting the stack to `depth` would copy it
            weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), stacked)
            return place(nnx.merge(graphdef, weights)(x, mask)), None

        return jax.lax.scan(layer, place(x), jnp.arange(depth))[0]


def _buckets(patch_mask: Bool[Array, "B h w"], side: int) -> Int[Array, "B h*w"]:
    """Which of the table's `side**2` positions each patch takes: that of its relative place; 0 at padding."""
    rows = jnp.asarray(_bucket_table(patch_mask.shape[1], side))[patch_mask[:, :, 0].sum(1)]
    columns = jnp.asarray(_bucket_table(patch_mask.shape[2], side))[patch_mask[:, 0, :].sum(1)]
    place = rows[:, :, None] * side + columns[:, None, :]
    return jnp.where(patch_mask, place, 0).reshape(len(patch_mask), -1)


def _bucket_table(longest: int, side: int) -> np.ndarray:
    """`table[n, i]`: how many boundaries 1/side, 2/side, ... are no larger than i / n, the coordinate of patch i of n.

    Coordinates often equal a boundary but for rounding, so they are computed as torch does it, in float32 and as i
    times the rounded 1 / n: hence a table, and no arithmetic on the device. (torch's own boundaries depend on the width
    of the processor's vectors at some sizes; not at the published models' 26, 27 and 32 patches on a side.)
    """
    step = np.float32(1) / np.maximum(np.arange(longest + 1), 1).astype(np.float32)
    place = np.minimum(np.arange(longest, dtype=np.float32) * step[:, None], np.float32(1 - 1e-6))
    boundaries = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    return np.searchsorted(boundaries, place, side="right")


def _interpolated(
    table: Float[Array, "P D"], grid: Int[Array, "B 2"], tokens: int, side: int
) -> Float[Array, "B tokens D"]:
    """The square table resized to each image's grid (bilinear, antialiased where it shrinks); the first at padding."""
    number = jnp.arange(tokens)
    number = jnp.where(number < grid.prod(-1, keepdims=True), number, 0)
    rows, columns = (
        _triangle(place, count[:, None], side)
        for place, count in zip(jnp.divmod(number, grid[:, 1:]), (grid[:, 0], grid[:, 1]))
    )
    weights = (rows[..., :, None] * columns[..., None, :]).reshape(*number.shape, side**2)
    return jnp.matmul(weights, table.astype(jnp.float32), precision="highest").astype(table.dtype)


def _triangle(place: Int[Array, "B T"], count: Int[Array, "B 1"], side: int) -> Float[Array, "B T side"]:
    """Weights of the `side` old places in new place `place` of `count`."""
    scale = (side / count)[..., None]
    distance = jnp.abs(jnp.arange(side) + 0.5 - (place[..., None] + 0.5) * scale)
    weights = jax.nn.relu(1 - distance / jnp.maximum(scale, 1))
    return weights / weights.sum(-1, keepdims=True)
