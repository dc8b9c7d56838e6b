"""One decoder for the language model families: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

What a family adds is a field of the config: biases, norms of queries and keys, fused projections, sliding windows.
The layers' weights are stacked on a leading axis and scanned, so that compile time does not grow with depth.
Architecture: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); sliding windows: Jiang et al. 2023 (arXiv 2310.06825).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pivotjax.models.language.rope import Rope, rotate, rotations

NO_WINDOW = 2**31 - 1
_PIECE = 256  # terms

Remat = Literal["none", "layers", "dots", "offload"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kind of a decoder.

    Fields:
        max_length: tokens that prompt and answer together may have.
        qkv_bias, o_bias, mlp_bias: which projections have one.
        qk_norm: queries and keys of each head are normalised before they turn.
        fused: one kernel for queries, keys and values, and one for gate and up.
        windows: how many of the last positions, its own included, a query of each layer sees (or NO_WINDOW); empty: all
            positions in every layer.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: Rope = field(default_factory=Rope)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_length: int = 2048
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    windows: tuple[int, ...] = ()


class Cache(NamedTuple):
    """Keys (already turned) and values of every layer in a buffer of fixed length S, and the positions of its slots."""

    key: Float[Array, "layers B S kv head_dim"]
    value: Float[Array, "layers B S kv head_dim"]
    position: Int[Array, "B S"]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, length: int, dtype=jnp.float32) -> "Cache":
        """A cache of zeros for `batch` sequences of up to `length` tokens."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32))


def _same(x: jax.Array) -> jax.Array:
    return x


class Plan(NamedTuple):
    """How the layers are computed in training; the numbers are the same.

    Fields:
        remat: what the backward pass computes again: `none`; whole `layers`, of which only the inputs are kept; or all
            but the products with weights (`dots`), which are kept, on the device or in the host's memory (`offload`).
        attention: instead of XLA's, for queries `[B,L,heads,head_dim]` over keys and values `[B,L,kv,head_dim]`.
        place: what is done to the activations `[B,L,D]` between layers: says where they live on a mesh.
    """

    remat: Remat = "none"
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    place: Callable[[jax.Array], jax.Array] = _same


PLAIN = Plan()


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Layer(nnx.Module):
    """One pre-norm decoder layer: attention, then SwiGLU, each added to its input."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        def linear(d_in, d_out, bias):
            return nnx.Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        c = self.config = config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attention_norm = RMSNorm(c.dim, c.norm_eps, dtype)
        if c.fused:
            self.qkv = linear(c.dim, queries + 2 * keys, c.qkv_bias)
        else:
            self.q, self.k, self.v = (linear(c.dim, size, c.qkv_bias) for size in (queries, keys, keys))
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps, dtype) for _ in range(2))
        self.o = linear(queries, c.dim, c.o_bias)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps, dtype)
        if c.fused:
            self.gate_up = linear(c.dim, 2 * c.mlp_dim, c.mlp_bias)
        else:
            self.gate, self.up = (linear(c.dim, c.mlp_dim, c.mlp_bias) for _ in range(2))
        self.down = linear(c.mlp_dim, c.dim, c.mlp_bias)

    def heads(self, x: Float[Array, "B L D"], cos: Float[Array, "B L pairs"], sin: Float[Array, "B L pairs"]):
        """Turned queries `[B,L,heads,head_dim]`, turned keys and values `[B,L,kv,head_dim]` of the layer's input."""
        c, x = self.config, self.attention_norm(x)
        if c.fused:
            queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
            parts = jnp.split(self.qkv(x), (queries, queries + keys), axis=-1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.reshape(*part.shape[:2], -1, c.head_dim) for part in parts)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(
        self, x: Float[Array, "B L D"], q, k, v, mask: Bool[Array, "B L S"] | None, attention: Callable | None = None
    ) -> Float[Array, "B L D"]:
        """Adds attention over the S keys (causal where `mask` is None; `attention` does it its own way) and the MLP."""
        if attention is None:
            mask = None if mask is None else mask[:, None]
            mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)  # softmax in float32
        else:
            mixed = attention(q, k, v)
        x = x + self.o(mixed.reshape(*x.shape[:2], -1))
        return x + self._mlp(self.mlp_norm(x))

    def _mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1) if self.config.fused else (self.gate(x), self.up(x))
        y = _in_short_sums(jax.nn.silu(gate) * up, self.down.kernel[...])
        return y + self.down.bias[...] if self.config.mlp_bias else y


class Decoder(nnx.Module):
    """The decoder; parameters and compute in `dtype`, norms and softmax in float32."""

    def __init__(self, config: DecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
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
        plan: Plan = PLAIN,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values written in.

        Without a cache S = L, and `mask=None` means causal. With one, the L new keys and values go to the slots
        `index .. index+L-1` of its S, and `mask` (needed) says which slots each query sees. Sliding windows come on top
        and go by position, not by slot.
        """
        if cache is not None and mask is None:
            raise ValueError("a cache needs a mask: which of its slots does each query see?")
        config = self.config
        cos, sin = rotations(config.rope, positions, config.head_dim)
        if cache is not None:
            slots = jax.lax.dynamic_update_slice(cache.position, positions.astype(jnp.int32), (0, index))
            cache = cache._replace(position=slots)
        if config.windows:
            back = positions[:, :, None] - (positions if cache is None else cache.position)[:, None]
            mask = jnp.tri(x.shape[1], dtype=bool)[None] if mask is None else mask
        graphdef, stacked = nnx.split(self.layers)

        def layer(carry, inputs):
            x, buffers = carry
            weights, number, window = inputs
            module = nnx.merge(graphdef, weights)
            q, k, v = module.heads(x, cos, sin)
            if buffers is not None:
                buffers = tuple(_write(buffer, new, number, index) for buffer, new in zip(buffers, (k, v)))
                k, v = (jax.lax.dynamic_index_in_dim(buffer, number, keepdims=False) for buffer in buffers)
            seen = mask & (back < window) if config.windows else mask
            return (plan.place(module.attend(x, q, k, v, seen, plan.attention)), buffers), None

        body = layer if plan.remat == "none" else jax.checkpoint(layer, policy=_policy(plan.remat))
        windows = jnp.array(config.windows, jnp.int32) if config.windows else None
        buffers = None if cache is None else (cache.key, cache.value)
        (x, buffers), _ = jax.lax.scan(body, (x, buffers), (stacked, jnp.arange(config.num_layers), windows))
        return self.norm(x), None if cache is None else Cache(*buffers, cache.position)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... vocab"]:
        """Next-token logits of final hidden states, accumulated and returned in float32."""
        kernel, tied = self.head_weights()
        return jnp.einsum(
            "...d,vd->...v" if tied else "...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32
        )

    def head_weights(self) -> tuple[jax.Array, bool]:
        """The matrix that makes logits: the head's `[D, vocab]`, or the embedding `[vocab, D]` and True."""
        tied = self.config.tie_embeddings
        return (self.embedding if tied else self.head.kernel)[...], tied


def _policy(remat: Remat) -> Callable | None:
    """What `jax.checkpoint` keeps of a layer."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    return policies.dots_with_no_batch_dims_saveable if remat == "dots" else None


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
