"""From a sample's bytes to pixels, as fast as Pillow; whatever is wrong with them has one of a few names."""

import io
import math
import re
import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from pivotjax.data import images
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.processors import Processor, flat

# Why a sample cannot be used; the place in this order is the index in counters.
REASONS: tuple[str, ...] = (
    "corrupt image",
    "empty caption",
    "absurd size",
    "non-RGB image",
    "decompression bomb",
    "unreadable shard",
    "missing image",
    "broken record",
)
BAD_LIMIT = 0.05  # share of samples that may be bad where nobody says otherwise
SHORTEST_EDGE = 8  # pixels: below it a picture shows nothing
MOST_ASPECT = 20  # longer edge by shorter
MOST_PIXELS = 1 << 26  # of a picture while it is decoded: 268 MB
MOST_BYTES = 1 << 27  # of an image file
_ENOUGH = 200  # samples: the share of bad ones among fewer says little

# Those that pictures on the web have. Others stay closed: Pillow would give PostScript to another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO")
_LONGEST_DETAIL = 300  # characters
_UNSCALED = ("I", "F")  # modes without a known range: no rule makes them RGB
_SILENT = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # a filter as the warnings module keeps it


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is one of `REASONS`, or `stream.TOO_LONG`; `detail` says in one line which
    sample, and more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:_LONGEST_DETAIL]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def too_many(bad: int, read: int, limit: float) -> bool:
    """Whether so many bad samples among those read show that more than a share `limit` is bad: by four standard errors,
    so that chance stops no data below it. Of fewer than 200 read as many must be bad as of 200."""
    read = max(read, _ENOUGH)
    margin = 4 * math.sqrt(max(limit * (1 - limit) * read, 0))
    return bad > limit * read + margin


def listed(counts: Iterable[tuple[str, int]]) -> str:
    """Reasons with their counts, for people."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts)


class Decoded(NamedTuple):
    """uint8 pixels, and whether the picture was not RGB (grey, palette, CMYK, 16 bits, transparent) before."""

    pixels: UInt8[np.ndarray, "S S 3"]
    converted: bool


def decode(
    item: Item, size: int, fit: Processor | None = None, non_rgb: Literal["convert", "drop"] = "convert"
) -> UInt8[np.ndarray, "S S 3"]:
    """The pixels alone of `decode_noted`."""
    return decode_noted(item, size, fit, non_rgb).pixels


def decode_noted(
    item: Item, size: int, fit: Processor | None = None, non_rgb: Literal["convert", "drop"] = "convert"
) -> Decoded:
    """The item's picture as an encoder of `size` x `size` pixels takes it.

    Turned as its camera says, made RGB (transparent parts white, 16 bits scaled to 8) or, with `non_rgb="drop"`,
    refused where it is not; then resized and cropped by `fit`, the encoder's own processor, or without one centred in a
    white square. Drawings (SVG, SMILES) are always drawn into the white square. Thread-safe, and prints nothing.

    Raises BadSample for whatever is wrong with the sample; InputError where a renderer is not installed or `fit` does
    not give `size` x `size` pixels.
    """
    if not item.caption.strip():
        raise BadSample("empty caption", item.key)
    if len(item.image) > MOST_BYTES:
        raise BadSample("absurd size", f"{item.key} has {len(item.image)} bytes")
    _hush()
    try:
        return _decoded(item, size, fit, non_rgb)
    except (BadSample, InputError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("decompression bomb", f"{item.key}: {error}") from error
    except Exception as error:  # Pillow's decoders meet broken bytes with nearly every exception that Python has
        raise BadSample("corrupt image", f"{item.key}: {error or type(error).__name__}") from error


def _decoded(item: Item, size: int, fit: Processor | None, non_rgb: str) -> Decoded:
    image = Image.open(io.BytesIO(images.drawn(item.image, item.kind, size)), formats=_FORMATS)
    _check_size(item.key, *image.size)
    image.load()
    _turn(image)
    converted = image.mode != "RGB" or "transparency" in image.info
    if item.kind in ("svg", "smiles"):
        return Decoded(images.square(image, size), False)
    if converted and (non_rgb == "drop" or image.mode in _UNSCALED):
        raise BadSample("non-RGB image", f"{item.key} is {image.mode}")
    pixels = images.square(image, size) if fit is None else np.asarray(fit.fit(flat(image)))
    if pixels.shape != (size, size, 3):
        found = " x ".join(map(str, pixels.shape[:2]))
        raise InputError(f"the encoder takes {size} x {size} pixels, its processor gives {found}; use one of one size")
    return Decoded(pixels, converted)


def _check_size(key: str, width: int, height: int) -> None:
    """Before anything is decoded."""
    found = f"{key} has {width} x {height} pixels"
    if width * height > MOST_PIXELS:
        raise BadSample("decompression bomb", found)
    shorter, longer = sorted((width, height))
    if shorter < SHORTEST_EDGE or longer > MOST_ASPECT * shorter:
        raise BadSample("absurd size", found)


def _turn(image: Image.Image) -> None:
    """Upright, in place. A picture whose EXIF block is broken is whole all the same."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # its parser raises as many kinds as the decoders
        image.info.pop("exif", None)


def _hush() -> None:
    """Pillow's warnings go nowhere: `BadSample` says it. `catch_warnings` is not for threads, hence a filter."""
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", module=_SILENT[3].pattern)
