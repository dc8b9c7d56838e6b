"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and how its frequencies are stretched for longer text.

Pair i of a head's channels turns by `position * base^(-2i/dim)`. What is called linear, llama3 and yarn divides each
frequency by a number of its own; longrope has two such lists, for short and for long text; dynamic raises the base as
the text grows. All as in transformers' config.json (`rope_parameters`, before version 5 `rope_scaling`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pivotjax.errors import InputError
from pivotjax.models.settings import Settings

KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn")}  # config.json's word: ours


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    Fields:
        base: of the frequencies.
        fraction: of each head's channels that turn; the rest stay as they are.
        divisors: of the frequencies, one a pair of channels; empty: 1.
        long_divisors: instead of `divisors` for all rows where the longest has more than `trained_length` tokens.
        growth: beyond `trained_length`, so much of the further length stretches the base (dynamic).
        trained_length: tokens.
        scale: of cosine and sine.
    """

    base: float = 10000.0
    fraction: float = 1.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    growth: float = 0.0
    trained_length: int = 0
    scale: float = 1.0


def rotations(
    rope: Rope, positions: Int[Array, "B L"], head_dim: int
) -> tuple[Float[Array, "B L pairs"], Float[Array, "B L pairs"]]:
    """Cosine and sine, float32, of the angle of each pair of channels at each position."""
    dim = _turning(rope.fraction, head_dim)
    exponents = np.arange(0, dim, 2) / dim
    plain = rope.base**-exponents
    frequencies = jnp.asarray(plain / (rope.divisors or 1), jnp.float32)
    length = positions.max() + 1
    if rope.long_divisors:
        long = jnp.asarray(plain / rope.long_divisors, jnp.float32)
        frequencies = jnp.where(length > rope.trained_length, long, frequencies)
    if rope.growth:
        stretch = 1 + rope.growth * jnp.maximum(length / rope.trained_length - 1, 0)
        frequencies *= stretch ** -(exponents * dim / (dim - 2))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles)


def rotate(
    x: Float[Array, "B L heads dim"], cos: Float[Array, "B L pairs"], sin: Float[Array, "B L pairs"]
) -> Float[Array, "B L heads dim"]:
    """Turns the first `2 * pairs` channels, rotate-half form: channel i is paired with channel `i + pairs`."""
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _turning(fraction: float, head_dim: int) -> int:
    return int(head_dim * fraction)


def read_rope(
    settings: Settings, head_dim: int, kinds: Mapping[str, str] = KINDS, partial: bool = False
) -> tuple[Rope, int]:
    """The embedding that a config.json describes, and the longest text in tokens that it is meant for.

    Read from `rope_parameters` (or `rope_scaling`, with `rope_theta` and the like beside it) and
    `max_position_embeddings`. `partial`: a part of each head may stay as it is. InputError if the kind is not one of
    `kinds`, or a field is missing or wrong.
    """
    fields = _fields(settings)
    kind = kinds[fields.one_of("rope_type", *kinds)]
    base, fraction = fields.number("rope_theta", above=1.0), fields.number("partial_rotary_factor")
    if not partial and fraction != 1:
        raise fields.unsupported("partial_rotary_factor", "in this family whole heads turn")
    dim, length = _turning(fraction, head_dim), settings.size("max_position_embeddings")
    pairs = (dim + 1) // 2
    if not pairs or 2 * pairs > head_dim:
        raise InputError(
            f"{settings.where}: {dim} of a head's {head_dim} channels cannot turn in pairs (head_dim, "
            "partial_rotary_factor); get the model's config.json again"
        )
    if kind == "default":
        return Rope(base, fraction), length
    if kind == "dynamic":
        factor = fields.number("factor")
        return Rope(base, fraction, growth=factor, trained_length=length), round(factor * length)
    if kind == "longrope":
        return _longrope(fields, base, fraction, pairs, length), length
    return _blended(kind, fields, base, fraction, dim, length)


def _fields(settings: Settings) -> Settings:
    """The fields of the embedding in one place; what stands in `rope_parameters` counts before what stands around it.

    But for the trained length: there transformers prefers the outer one.
    """
    given = settings.part("rope_scaling" if settings.get("rope_scaling") else "rope_parameters")
    for name, value in given.fields.items():
        if isinstance(value, Mapping):  # a kind of layer with an embedding of its own
            raise given.unsupported(name, "all layers need the same fields")
    fields = {
        "rope_type": given.get("type") or "default",
        "original_max_position_embeddings": settings.get("max_position_embeddings"),
        "rope_theta": settings.get("rope_theta"),
        "partial_rotary_factor": settings.get("partial_rotary_factor"),
    }
    fields |= given.fields
    if settings.get("original_max_position_embeddings") is not None:
        fields["original_max_position_embeddings"] = settings.get("original_max_position_embeddings")
    return Settings(fields, given.where)


def _blended(kind: str, fields: Settings, base: float, fraction: float, dim: int, length: int) -> tuple[Rope, int]:
    """Kinds that divide by `factor`, some frequencies wholly, some in part, some not at all."""
    original, scale = fields.size("original_max_position_embeddings"), 1.0
    factor = fields.number("factor")
    pair = np.arange((dim + 1) // 2)
    if kind == "linear":  # config.json gives the length before stretching
        kept, length = np.zeros(len(pair)), round(factor * length)
    elif kind == "llama3":  # by how often a pair turns within the trained length
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise fields.unsupported("high_freq_factor", "it must be above low_freq_factor")
        turns = original * base ** (-2.0 * pair / dim) / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:  # yarn (Peng et al. 2023, arXiv 2309.00071), a ramp over the pairs
        start, end = _ramp(fields, base, dim, original)
        kept, length = 1 - np.clip((pair - start) / (end - start), 0, 1), max(length, round(factor * original))
        scale = fields.number_or_none("attention_factor") or _yarn_scale(fields, factor)
    return Rope(base, fraction, tuple((1 / (kept + (1 - kept) / factor)).tolist()), scale=scale), length


def _ramp(fields: Settings, base: float, dim: int, original: int) -> tuple[float, float]:
    """The pairs that turn `beta_fast` and `beta_slow` times within the original length."""
    turns = (fields.number_or_none("beta_fast") or 32, fields.number_or_none("beta_slow") or 1)
    start, end = (dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
    if fields.get("truncate") is not False:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    return start, end if end != start else end + 0.001


def _yarn_scale(fields: Settings, factor: float) -> float:
    def scale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, every = fields.number_or_none("mscale"), fields.number_or_none("mscale_all_dim")
    return scale(mscale) / scale(every) if mscale and every else scale(1)


def _longrope(fields: Settings, base: float, fraction: float, pairs: int, length: int) -> Rope:
    """Two lists of divisors (Ding et al. 2024, arXiv 2402.13753)."""
    original = int(fields.number("original_max_position_embeddings", above=1))
    factor = fields.number_or_none("factor") or length / original
    scale = fields.number_or_none("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = fields.numbers("short_factor", pairs), fields.numbers("long_factor", pairs)
    return Rope(base, fraction, short, long, trained_length=original, scale=scale)
