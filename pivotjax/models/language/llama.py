"""A Llama-family decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU, tied or untied embeddings.

The layers' weights are stacked on a leading axis and scanned, so that compile time does not grow with depth.
Architecture: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); rotary embedding in Hugging Face's rotate-half form.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

_PIECE = 256  # terms


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama decoder."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_length: int = 2048


class Cache(NamedTuple):
    """Keys (already rotated) and values of every layer, in a buffer of fixed length S."""

    key: Float[Array, "layers B S kv head_dim"]
    value: Float[Array, "layers B S kv head_dim"]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> "Cache":
        """A cache of zeros for `batch` sequences of up to `length` tokens."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rope_angles(positions: Int[Array, "B L"], head_dim: int, base: float) -> Float[Array, "B L half"]:
    """Angle of each pair of channels at each position, float32: `position * base^(-2i/head_dim)`."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate(x: Float[Array, "B L heads dim"], angles: Float[Array, "B L half"]) -> Float[Array, "B L heads dim"]:
    """Rotary position embedding, rotate-half form: channel i is paired with channel i + dim/2."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Layer(nnx.Module):
    """One pre-norm decoder layer: attention, then SwiGLU, each added to its input."""

    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        def linear(d_in, d_out):
            return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)

        c = self.config = config
        self.attention_norm = RMSNorm(c.dim, c.norm_eps, dtype)
        self.q = linear(c.dim, c.num_heads * c.head_dim)
        self.k = linear(c.dim, c.num_kv_heads * c.head_dim)
        self.v = linear(c.dim, c.num_kv_heads * c.head_dim)
        self.o = linear(c.num_heads * c.head_dim, c.dim)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps, dtype)
        self.gate = linear(c.dim, c.mlp_dim)
        self.up = linear(c.dim, c.mlp_dim)
        self.down = linear(c.mlp_dim, c.dim)

    def heads(self, x: Float[Array, "B L D"], angles: Float[Array, "B L half"]):
        """Rotated queries `[B,L,heads,head_dim]`, rotated keys and values `[B,L,kv,head_dim]` of the layer's input."""
        x = self.attention_norm(x)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.config.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        return rotate(q, angles), rotate(k, angles), v

    def attend(self, x: Float[Array, "B L D"], q, k, v, mask: Bool[Array, "B L S"] | None) -> Float[Array, "B L D"]:
        """Adds attention over the S keys (causal where `mask` is None) and the MLP to `x`."""
        mask = None if mask is None else mask[:, None]
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)  # softmax in float32
        x = x + self.o(mixed.reshape(*x.shape[:2], -1))
        y = self.mlp_norm(x)
        return x + _in_short_sums(jax.nn.silu(self.gate(y)) * self.up(y), self.down.kernel[...])


class Llama(nnx.Module):
    """The decoder; parameters and compute in `dtype`, norms and softmax in float32."""

    def __init__(self, config: LlamaConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.dim), dtype))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Layer(config, dtype=dtype, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        if not config.tie_embeddings:
            sizes, kind = (config.dim, config.vocab_size), dict(dtype=dtype, param_dtype=dtype)
            self.head = nnx.Linear(*sizes, use_bias=False, **kind, rngs=rngs)

    def embed(self, tokens: Int[Array, "... L"]) -> Float[Array, "... L D"]:
        """Input embeddings of token ids in `0..vocab_size-1`."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        mask: Bool[Array, "B L S"] | None,
        cache: Cache | None = None,
        index: int | Int[Array, ""] = 0,
        remat: bool = False,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values written in.

        Without a cache S = L, and `mask=None` means causal. With one, the L new keys and values go to the slots
        `index .. index+L-1` of its S, and `mask` (needed) says which slots each query sees. `remat` recomputes each
        layer in the backward pass instead of keeping its activations.
        """
        if cache is not None and mask is None:
            raise ValueError("a cache needs a mask: which of its slots does each query see?")
        config = self.config
        angles = rope_angles(positions, config.head_dim, config.rope_base)
        graphdef, stacked = nnx.split(self.layers)

        def layer(carry, inputs):
            x, cache = carry
            weights, number = inputs
            module = nnx.merge(graphdef, weights)
            q, k, v = module.heads(x, angles)
            if cache is not None:
                cache = Cache(*(_write(buffer, new, number, index) for buffer, new in zip(cache, (k, v))))
                k, v = (jax.lax.dynamic_index_in_dim(buffer, number, keepdims=False) for buffer in cache)
            return (module.attend(x, q, k, v, mask), cache), None

        body = jax.checkpoint(layer) if remat else layer
        (x, cache), _ = jax.lax.scan(body, (x, cache), (stacked, jnp.arange(config.num_layers)))
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... vocab"]:
        """Next-token logits of final hidden states, accumulated and returned in float32."""
        if self.config.tie_embeddings:
            return jnp.einsum("...d,vd->...v", hidden, self.embedding[...], preferred_element_type=jnp.float32)
        return jnp.einsum("...d,dv->...v", hidden, self.head.kernel[...], preferred_element_type=jnp.float32)


def _in_short_sums(x: Float[Array, "B L M"], kernel: Float[Array, "M D"]) -> Float[Array, "B L D"]:
    """`x @ kernel`; in float32 summed in pieces of 256 terms.

    At a sequence's first position a few of these activations are huge, and a CPU that adds all terms one after the
    other loses the small ones behind them: the logits of a 135M model come out up to 2e-4 from float64, in pieces 8e-5.
    """
    if x.dtype != jnp.float32:
        return x @ kernel
    cuts = tuple(range(_PIECE, len(kernel), _PIECE))
    return sum(a @ b for a, b in zip(jnp.split(x, cuts, axis=-1), jnp.split(kernel, cuts)))


def _write(buffer, new, layer, index):
    """Puts one layer's new keys or values `[B,L,kv,head_dim]` into the cache; in place inside a compiled loop."""
    return jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), (layer, 0, index, 0, 0))
