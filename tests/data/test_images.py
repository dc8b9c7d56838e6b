"""Rendering: geometry, white ground, every kind of broken picture."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from pivotjax.data.images import open_image, render
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError


def picture(data: bytes, kind: str = "png") -> Item:
    return Item("things/broken", "broken", "broken", data, kind)


def png(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(640, 512), (384, 512), (24, 24)])
def test_svg_keeps_its_proportions_in_the_middle_of_white(width, height):
    box = f'viewBox="0 0 {width} {height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {box}><rect width="100%" height="100%"/></svg>'
    black = render(picture(svg.encode(), "svg"))[..., 0] < 128
    longest = max(width, height)
    assert abs(black.any(0).sum() - 224 * width / longest) <= 1
    assert abs(black.any(1).sum() - 224 * height / longest) <= 1
    ys, xs = np.nonzero(black)
    assert abs(xs.mean() - 111.5) <= 1 and abs(ys.mean() - 111.5) <= 1
    assert set(np.unique(render(picture(svg.encode(), "svg"))[~black])) <= {255}


def test_transparency_becomes_white():
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 5, 10))
    pixels = render(picture(png(image)))
    assert (pixels[100, 200] == 255).all() and tuple(pixels[100, 20]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK", "I;16"])
def test_every_mode_of_a_file(tmp_path, mode):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    grey = np.full((6, 6), 255, np.uint8)
    grey[:, :3] = 0
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(grey).convert(mode).save(path)
    pixels = open_image(path)
    assert pixels[100, 10].max() < 40 and pixels[100, 210].min() > 215


def test_camera_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    (tmp_path / "x.jpg").write_bytes(png(image, "JPEG", exif=exif))
    red = open_image(tmp_path / "x.jpg")[..., 1] < 128
    assert red.any(0).sum() == 112 and red.any(1).sum() == 224


def test_svg_file(tmp_path):
    path = tmp_path / "x.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1" fill="red"/></svg>'
    )
    assert tuple(open_image(path)[112, 112]) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "png"),
        (b"no picture", "png"),
        (png(Image.new("RGB", (50, 50), "red"))[:60], "png"),
        (b"<svg", "svg"),
        (b"\xff\xfe\x00", "svg"),
        (b"C1CC", "smiles"),
    ],
)
def test_a_broken_item_is_named_in_one_line(data, kind):
    with pytest.raises(InputError, match="image of things/broken") as caught:
        render(picture(data, kind))
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_named_in_one_line(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = tmp_path / "cut.png"
    cut.write_bytes(png(Image.fromarray(noise))[:5000])
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    for path in (cut, text, tmp_path, tmp_path / "missing.png"):
        with pytest.raises(InputError, match="cannot read the image") as caught:
            open_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "kind"), [("resvg_py", "svg"), ("rdkit", "smiles")])
def test_missing_renderer_names_the_extra(monkeypatch, module, kind):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pivotjax\[demo\]"):
        render(picture(b"CCO", kind))


def test_molecule_is_drawn_the_same_every_time():
    first, second = (render(picture(b"C1=CC=CC=C1", "smiles")) for _ in range(2))
    assert np.array_equal(first, second) and first.shape == (224, 224, 3) and first.std() > 5
