"""Pictures as the encoder takes them: square, white ground, three channels, uint8."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from pivotjax.data.sources.base import Item
from pivotjax.data.sources.molecules import draw
from pivotjax.errors import InputError

SIZE = 224
_FILTER = Image.Resampling.BICUBIC
_DRAWN = 1024  # pixels of a drawing's longer edge, where nothing else says
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that the decoders raise


def render(item: Item, size: int = SIZE) -> UInt8[np.ndarray, "S S 3"]:
    """The item's picture, centred in a white square of `size` pixels. InputError naming it where it cannot be read."""
    try:
        return square(ImageOps.exif_transpose(_decode(item.image, item.kind, size)), size)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the image of {item.key}: {_line(error)}; fetch its package again") from error


def open_image(path: Path, size: int = SIZE) -> UInt8[np.ndarray, "S S 3"]:
    """Any picture file, turned as its camera says, centred in a white square of `size` pixels; InputError names it."""
    return square(ImageOps.exif_transpose(read_image(path, size)), size)


def read_image(path: Path, drawn: int = _DRAWN) -> Image.Image:
    """Any picture file as it is; a drawing (SVG) fits in `drawn` x `drawn`. InputError names one that is broken."""
    path = Path(path)
    try:
        image = _decode(path.read_bytes(), "svg" if path.suffix.lower() == ".svg" else "png", drawn)
        image.load()
        return image
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the image {path}: {_line(error)}; give a PNG, JPEG, WebP or SVG file") from error


def _decode(data: bytes, kind: str, size: int) -> Image.Image:
    return Image.open(io.BytesIO(drawn(data, kind, size)))


def drawn(data: bytes, kind: str, size: int) -> bytes:
    """What Pillow reads: of an SVG or a molecule a PNG that fits in `size` x `size`, of a picture its own bytes."""
    if kind == "smiles":
        return draw(data.decode(), size)
    return _rasterise(data.decode(), size) if kind == "svg" else data


def _rasterise(svg: str, size: int) -> bytes:
    """PNG that fits in `size` x `size`. System fonts are left alone, so that every machine draws the same picture."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError('drawing SVG needs resvg: pip install "pivotjax[demo]"') from error
    return resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A picture of any mode, centred in a white square of `size` pixels."""
    if image.mode.startswith("I;16"):  # 16 bits of grey; Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "RGB" if image.mode == "RGB" and "transparency" not in image.info else "RGBA"
    fitted = ImageOps.contain(image.convert(mode) if image.mode != mode else image, (size, size), _FILTER)
    canvas = Image.new(mode, (size, size), "white")
    place = ((size - fitted.width) // 2, (size - fitted.height) // 2)
    canvas.paste(fitted, place) if mode == "RGB" else canvas.alpha_composite(fitted, place)
    return np.asarray(canvas.convert("RGB"))


def _line(error: Exception) -> str:
    """The error in one line; the operating system's errors without their number."""
    return (getattr(error, "strerror", None) or str(error).replace("\n", " ") or type(error).__name__)[:200]
