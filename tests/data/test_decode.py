"""Decoding: Pillow's own pixels, every mode, every way to be broken, no warnings, in threads."""

import io
import os
import pickle
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from corpus_files import encoded, noise, png_that_says
from PIL import Image

from pivotjax.data import decode as decoding
from pivotjax.data.decode import MOST_PIXELS, BadSample, decode, decode_noted
from pivotjax.data.images import render
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.processors import Normalisation, Processor

CLIP = Processor(Normalisation(), Image.Resampling.BICUBIC, 32, (32, 32))
RNG = np.random.default_rng(0)


def item(data: bytes, caption: str = "a cat", kind: str = "picture") -> Item:
    return Item("k", "cat", caption, data, kind)


def reason(data: bytes, **options) -> str:
    with pytest.raises(BadSample) as caught:
        decode(item(data), 32, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 50), (64, 64), (20, 30), (33, 97)])
def test_the_encoders_own_resize_and_crop(width, height):
    """As transformers' CLIPImageProcessor: shorter edge to 32 (bicubic), middle 32 x 32."""
    data = encoded(noise(height, width))
    image = Image.open(io.BytesIO(data))
    scale = 32 / min(width, height)
    size = (32, int(height * scale)) if width <= height else (int(width * scale), 32)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    found = decode_noted(item(data), 32, CLIP)
    assert np.array_equal(found.pixels, np.asarray(expected)) and not found.converted
    assert np.array_equal(found.pixels, CLIP.fitted(np.asarray(image)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_without_a_processor_it_is_the_white_square(form):
    data = encoded(noise(20, 40), form)
    assert np.array_equal(decode(item(data), 32), render(item(data, kind="png"), 32))
    assert (decode(item(data), 32)[:8] == 255).all()


def grey(values: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("fit", [None, CLIP], ids=["square", "clip"])
@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"),
     ("I;16", "PNG"), ("I;16", "TIFF"), ("LA", "PNG"), ("RGBA", "PNG"), ("YCbCr", "TIFF")],
)  # fmt: skip
def test_every_mode_is_converted_and_noted_or_dropped(mode, form, fit):
    values = np.zeros((32, 32), np.uint8)
    values[:, 16:] = 255
    data = encoded(grey(values, mode), form)
    found = decode_noted(item(data), 32, fit)
    assert found.converted and found.pixels.dtype == np.uint8
    assert np.abs(found.pixels.astype(int) - values[..., None]).max() <= 4
    assert reason(data, fit=fit, non_rgb="drop") == "non-RGB image"


def test_rgb_is_not_converted_and_never_dropped():
    for form in ("JPEG", "PNG", "WEBP"):
        assert not decode_noted(item(encoded(noise(), form)), 32, CLIP, "drop").converted


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    for fit in (None, CLIP):
        pixels = decode(item(encoded(image, "PNG")), 32, fit)
        assert tuple(pixels[5, 2]) == (0, 0, 255) and tuple(pixels[5, 30]) == (255, 255, 255)
        assert (decode(item(encoded(palette, "PNG", transparency=1)), 32, fit) == 255).all()


@pytest.mark.parametrize("fit", [None, CLIP], ids=["square", "clip"])
def test_the_camera_s_turn_is_undone(fit):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:8] = 255
    turned, exif = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    pixels = decode(item(encoded(turned, "PNG", exif=exif)), 32, fit)
    assert np.array_equal(pixels, upright)
    whole = encoded(noise(32, 32), exif=b"Exif\0\0" + os.urandom(200))
    assert np.array_equal(decode(item(whole), 32, fit), decode(item(encoded(noise(32, 32))), 32, fit))


WHOLE = encoded(noise(60, 80))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "corrupt image"),
        (b"\0", "corrupt image"),
        (b"<html>404</html>", "corrupt image"),
        (WHOLE[: len(WHOLE) // 2], "corrupt image"),
        (encoded(noise(60, 80), "PNG")[:3000], "corrupt image"),
        (encoded(noise(60, 80), "WEBP")[:-500], "corrupt image"),
        (encoded(noise(60, 80), "GIF")[:2000], "corrupt image"),
        (encoded(noise(60, 80), "TIFF")[:2000], "corrupt image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n", "corrupt image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "corrupt image"),
        (encoded(Image.new("RGB", (1, 1))), "absurd size"),
        (encoded(Image.new("RGB", (7, 50))), "absurd size"),
        (encoded(Image.new("RGB", (2000, 20))), "absurd size"),
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "decompression bomb"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "decompression bomb"),
        (encoded(Image.new("I", (20, 20)), "TIFF"), "non-RGB image"),
        (encoded(Image.new("F", (20, 20)), "TIFF"), "non-RGB image"),
    ],
    ids=range(17),
)
def test_what_is_broken_has_a_name(data, expected):
    assert reason(data) == reason(data, fit=CLIP) == expected


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(Image.new("1", (9000, 9000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    assert reason(data) == "decompression bomb"
    assert 9000 * 9000 > MOST_PIXELS


@pytest.mark.parametrize("caption", ["", " ", "\n\t"])
def test_an_empty_caption(caption):
    with pytest.raises(BadSample, match="empty caption"):
        decode(item(WHOLE, caption), 32)


def test_pillow_knows_every_format():
    """One that it does not know would make `Image.open` refuse pictures of others."""
    Image.init()
    assert set(decoding._FORMATS) <= set(Image.OPEN)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "ICO"])
def test_no_bytes_do_more_than_raise_bad_sample(form, capfd, recwarn):
    """Two hundred spoilt files of each kind: flipped bytes, cuts, repeats."""
    data = encoded(noise(16, 16), form)
    for number in range(200):
        spoilt = bytearray(data)
        for place in RNG.integers(0, min(len(data), 400), 1 + number % 4):
            spoilt[place] = RNG.integers(256)
        spoilt = bytes(spoilt[: RNG.integers(len(data))]) if number % 3 == 0 else bytes(spoilt)
        try:
            assert decode(item(spoilt), 32, CLIP).shape == (32, 32, 3)
        except BadSample:
            pass
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_warnings_are_silent_in_threads_too(recwarn):
    warnings.simplefilter("always")
    palette = Image.new("P", (20, 20))
    palette.putpalette([0] * 768)
    loud = [
        encoded(palette, "PNG", transparency=bytes(range(256))),
        encoded(noise(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
    ]
    large = png_that_says(9000, 10_000)
    with pytest.warns(Image.DecompressionBombWarning):  # Pillow itself does warn
        Image.open(io.BytesIO(large))
    assert reason(large) == "decompression bomb"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda data: decode(item(data), 32), loud * 50))
    assert not recwarn.list
    assert len([f for f in warnings.filters if f[3] == re.compile(r"PIL\.")]) <= 4


def test_drawings_are_drawn_into_the_square_whatever_the_processor():
    svg = item(
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1"/></svg>', kind="svg"
    )
    found = decode_noted(svg, 32, CLIP, "drop")
    assert np.array_equal(found.pixels, render(svg, 32)) and not found.converted
    with pytest.raises(BadSample, match="corrupt image"):
        decode(item(b"<svg", kind="svg"), 32)


def test_a_missing_renderer_is_no_bad_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"pivotjax\[demo\]"):
        decode(item(b"<svg/>", kind="svg"), 32)


def test_a_processor_of_another_size_is_no_bad_sample():
    with pytest.raises(InputError, match="the encoder takes 16 x 16 pixels, its processor gives 32 x 32"):
        decode(item(WHOLE), 16, CLIP)


def test_bad_samples_travel():
    error = pickle.loads(pickle.dumps(BadSample("corrupt image", "a\nb")))
    assert (error.reason, error.detail, str(error)) == ("corrupt image", "a b", "corrupt image: a b")
