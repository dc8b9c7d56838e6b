"""Hashes that choose: the same on every machine, whatever is asked first."""

import hashlib

import numpy as np
from jaxtyping import Float64, UInt64


def of_text(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def mixed(values: UInt64[np.ndarray, "*N"], salt: int = 0) -> UInt64[np.ndarray, "*N"]:
    """Every bit of the result depends on every bit of a value and of the salt (the finaliser of SplitMix64).

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = np.asarray(values, np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def ordered(keys: UInt64[np.ndarray, " N"], purpose: str, seed: int) -> UInt64[np.ndarray, " N"]:
    """Numbers that put the keys in an order of their own for each purpose and seed."""
    return mixed(keys, of_text(f"{purpose}:{seed}"))


def fractions(keys: UInt64[np.ndarray, " N"], purpose: str, seed: int) -> Float64[np.ndarray, " N"]:
    """A number in [0, 1) for each key, purpose and seed."""
    return (ordered(keys, purpose, seed) >> np.uint64(11)) * 2.0**-53
