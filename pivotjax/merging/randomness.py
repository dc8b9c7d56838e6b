"""Uniform draws keyed to (seed, expert's name, leaf's path, entry): never to an expert's position or to what else is
merged, so that a merge does not depend on the order of its experts nor on how a model is cut into chunks.

The draw of entry i is a hash of i and of a 64-bit key: two rounds of a 32-bit integer mixer, computed where it is used.
Nothing is stored, XLA fuses and vectorises it, and every backend gives the same bits; `jax.random` (threefry) costs
several times what the rest of a DARE merge does. Made for masks, not for secrets.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging.registry import Bounds

Seed = Annotated[int, Bounds(0)]


def keys(seed: int, names: Sequence[str], path: str) -> np.ndarray:
    """uint32 `[K, 2]`: each expert's key for one leaf, BLAKE2b of `seed`, name and path, separated by NUL."""
    digests = [hashlib.blake2b(f"{int(seed)}\0{name}\0{path}".encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(len(names), 2)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 draws from [0, 1), multiples of 2^-24.

    Entry i (in row-major order) is the upper 24 bits of `mix(mix(i xor key[0]) + key[1])`.

    Args:
        key: uint32 `[2]`.
        shape: of the result; entries repeat after 2^32.
    """
    index = jax.lax.iota(jnp.uint32, int(np.prod(shape, dtype=int))).reshape(shape)
    bits = _mix(_mix(index ^ key[0]) + key[1])
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers: each bit of x changes each bit of the result about half of the time (C. Wellons'
    `lowbias32`, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
