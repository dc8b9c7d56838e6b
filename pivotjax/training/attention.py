"""Splash attention: TPU's kernel that never holds the scores `[heads, L, L]`, in place of the decoder's attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pivotjax.errors import InputError
from pivotjax.models.language import DecoderConfig
from pivotjax.training.parallel import ROWS

_LANES = 128  # a block is a multiple of these
_BLOCK = 768  # largest; what the backward kernel holds of it fits a v5e's VMEM

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def check_splash(config: DecoderConfig, length: int, platform: str, tensor: int) -> None:
    """InputError where the kernel cannot stand in for the decoder's attention over rows of `length` tokens."""
    if platform != "tpu":
        raise InputError(f"training.attention: splash is a TPU's, these devices are {platform}; use xla")
    if any(window < length for window in config.windows):
        raise InputError(
            f"training.attention: splash sees whole rows, this model's windows of {min(config.windows)} tokens are "
            f"shorter than rows of {length}; use xla"
        )
    if config.num_kv_heads % tensor:
        raise InputError(
            f"training.attention: splash cannot spread {config.num_kv_heads} key heads over mesh.tensor = {tensor}; "
            "make it a divisor, or use xla"
        )


def splash(mesh: Mesh | None, segments: Int[Array, "B L"] | None, interpret: bool = False) -> Attention:
    """Causal attention within segments (None: rows are one segment) by the kernel: `[B,L,heads,d]` over `[B,L,kv,d]`.

    On a mesh every device attends for its own rows and heads. `interpret` runs the kernel step by step on any device.
    """

    def attend(q, k, v):
        if mesh is None:
            return _local(q, k, v, segments, interpret)
        heads, rows = P(ROWS, None, "tensor"), None if segments is None else P(ROWS)
        local = jax.shard_map(
            lambda *parts: _local(*parts, interpret),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,  # the kernel says nothing about how its results vary
        )
        return local(q, k, v, segments)

    return attend


def _local(
    q: Float[Array, "B L heads d"],
    k: Float[Array, "B L kv d"],
    v: Float[Array, "B L kv d"],
    segments: Int[Array, "B L"] | None,
    interpret: bool,
) -> Float[Array, "B L heads d"]:
    length, heads, width = q.shape[1:]
    count = -(-length // _BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    total = count * block

    def ready(x):  # [B, heads, total, d]; what is added comes after every real token, so that none sees it
        return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, total - length), (0, 0)])

    mask = masks.MultiHeadMask([masks.CausalMask((total, total))] * heads)
    sizes = kernels.BlockSizes(*[block] * 6, block_q_dq=block, block_kv_dq=block)
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    ids = None
    if segments is not None:
        padded = jnp.pad(segments, [(0, 0), (0, total - length)])
        ids = kernels.SegmentIds(padded, padded)
    mixed = jax.vmap(kernel)(ready(q * width**-0.5), ready(k), ready(v), ids)
    return mixed[:, :, :length].swapaxes(1, 2)
