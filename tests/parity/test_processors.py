"""Image preprocessing against transformers' Pillow processors: the same arrays from the same pictures."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from pivotjax.errors import InputError
from pivotjax.models.processors import PROCESSORS, Normalisation, load_processor, read_processor, rgb

# Heights and widths: odd, of one row or column, very long, smaller than the target, of it, of tiles.
SHAPES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (7, 3),
    (31, 500),
    (333, 40),
    (64, 64),
    (65, 64),
    (97, 131),
    (128, 192),
    (2, 3000),
]
MEAN = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]}
PINPOINTS = [[128, 128], [192, 64], [64, 128], [128, 64], [64, 192]]  # the largest first

# (class without its suffix, fields)
SINGLE = [
    ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
    ("CLIP", {"size": 64, "crop_size": 64}),
    ("CLIP", {"size": {"shortest_edge": 33}, "crop_size": {"height": 48, "width": 31}} | MEAN),
    ("CLIP", {"do_resize": False, "crop_size": {"height": 50, "width": 51}}),
    ("CLIP", {"size": {"height": 41, "width": 23}, "do_center_crop": False, "resample": 2}),
    ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": 64, "do_normalize": False}),
    ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": 64, "do_rescale": False, "do_normalize": False}),
    ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": 64, "rescale_factor": 0.01} | MEAN),
    ("Siglip", {"size": {"height": 64, "width": 64}}),
    ("Siglip", {"size": {"height": 63, "width": 96}, "resample": 1} | MEAN),
    ("Llava", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
    ("Llava", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "do_pad": True}),
    ("Llava", {"size": {"height": 37, "width": 37}, "crop_size": 37, "do_pad": True} | MEAN),
    ("Llava", {"size": {"shortest_edge": 64}, "crop_size": 64, "do_pad": True, "do_normalize": False}),
]
TILED = [
    ("LlavaNext", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
    ("LlavaNext", {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}} | MEAN),
    ("LlavaNext", {"size": {"shortest_edge": 48}, "crop_size": {"height": 64, "width": 64}}),
    ("LlavaNext", {"size": {"shortest_edge": 64}, "do_center_crop": False, "crop_size": {"height": 64, "width": 64}}),
]
NESTED = [
    ("Idefics3", {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}),
    ("SmolVLM", {"size": {"longest_edge": 300}, "max_image_size": {"longest_edge": 64}} | MEAN),
    ("SmolVLM", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}),
    ("Idefics3", {"do_resize": False, "max_image_size": {"longest_edge": 96}, "resample": 3}),
    ("Idefics3", {"do_image_splitting": False, "size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}),
]
NAFLEX = [
    ("Siglip2", {"patch_size": 8, "max_num_patches": 49}),
    ("Siglip2", {"patch_size": 16, "max_num_patches": 256, "resample": 3} | MEAN),
]


def theirs(kind, fields):
    return getattr(transformers, f"{kind}ImageProcessorPil")(**fields)


def ours(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    return load_processor(tmp_path)


def picture(shape, seed=0, mode="RGB"):
    """Smooth colours with noise and sharp edges."""
    rng = np.random.default_rng(seed)
    height, width = shape
    ramp = np.linspace(0, 255, height)[:, None, None] * [0.2, 0.5, 1] + np.linspace(0, 200, width)[None, :, None]
    noise = rng.integers(0, 256, (height, width, 3)) * (rng.random((height, width, 1)) < 0.3)
    return Image.fromarray((ramp + noise).astype(np.int64).astype(np.uint8)).convert(mode)


def assert_same(found, expected):
    """Bit for bit. `rows` and `cols` come too, where transformers gives them on request."""
    for name, value in expected.items():
        got, value = np.asarray(found[name]), np.asarray(value)
        assert got.shape == value.shape, name
        np.testing.assert_array_equal(got, value, err_msg=name)
    assert found["pixel_values"].dtype == np.float32


def names(cases):
    return [f"{kind}-{number}" for number, (kind, _) in enumerate(cases)]


@pytest.mark.parametrize("kind, fields", SINGLE, ids=names(SINGLE))
def test_one_image_a_picture(tmp_path, kind, fields):
    reference = theirs(kind, fields)
    processor = ours(reference, tmp_path)
    for seed, shape in enumerate(SHAPES):
        image = picture(shape, seed)
        assert_same(processor([image]), reference([image], return_tensors="np"))
    if "do_resize" not in fields:
        batch = [picture((97, 131)), picture((65, 64))]
        assert_same(processor(batch), reference(batch, return_tensors="np"))


@pytest.mark.parametrize("kind, fields", TILED, ids=names(TILED))
def test_tiles_at_the_best_resolution(tmp_path, kind, fields):
    reference = theirs(kind, {"image_grid_pinpoints": PINPOINTS} | fields)
    processor = ours(reference, tmp_path)
    square = fields.get("do_center_crop", True) or "height" in fields["size"]
    for seed, shape in enumerate(SHAPES if square else [(64, 64), (300, 300)]):
        image = picture(shape, seed)
        assert_same(processor([image]), reference([image], return_tensors="np"))
    if square:
        batch = [picture(shape, seed) for seed, shape in enumerate(SHAPES)]
        assert_same(processor(batch), reference(batch, return_tensors="np"))


@pytest.mark.parametrize("kind, fields", NESTED, ids=names(NESTED))
def test_tiles_and_the_whole(tmp_path, kind, fields):
    reference = theirs(kind, fields | {"return_row_col_info": True})
    processor = ours(reference, tmp_path)
    for seed, shape in enumerate(SHAPES[:-1]):
        image = picture(shape, seed)
        assert_same(processor([image]), reference([image], return_tensors="np"))
    shapes = [SHAPES[5:8], SHAPES[8:9], SHAPES[9:10] * 2]  # three samples of 3, 1 and 2 pictures
    samples = [[picture(shape, seed) for seed, shape in enumerate(some)] for some in shapes]
    found, expected = processor(samples), reference(samples, return_tensors="np")
    assert (found["rows"], found["cols"]) == (expected.pop("rows"), expected.pop("cols"))
    assert_same(found, expected)
    assert found["pixel_attention_mask"].min() == 0  # fewer tiles in some samples


def test_idefics3_never_scales_an_edge_beyond_4096(tmp_path):
    reference = theirs("Idefics3", {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 1024}})
    for shape in ((9, 100), (100, 9)):
        image = picture(shape)
        assert_same(ours(reference, tmp_path)([image]), reference([image], return_tensors="np"))


@pytest.mark.parametrize("kind, fields", NAFLEX, ids=names(NAFLEX))
def test_patches(tmp_path, kind, fields):
    reference = theirs(kind, fields)
    batch = [picture(shape, seed) for seed, shape in enumerate(SHAPES)]
    assert_same(ours(reference, tmp_path)(batch), reference(batch, return_tensors="np"))
    whole = read_processor(json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"do_resize": False}, "")
    with pytest.raises(InputError, match="0 x 0 patches, not 1 to"):
        whole(batch[:1])


def modes():
    """Pictures of every mode, one of them with transparency in its palette."""
    base = picture((40, 50))
    clear = base.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    palette = base.quantize(16)
    palette.info["transparency"] = 3
    plain = [base.convert(mode) for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")]
    return [*plain, clear, clear.convert("LA"), clear.convert("RGBa"), palette, base.quantize(16)]


@pytest.mark.parametrize("kind, fields", [("CLIP", {}), ("Siglip", {}), NESTED[0]])
def test_pictures_of_every_mode(tmp_path, kind, fields):
    reference = theirs(kind, fields)
    processor = ours(reference, tmp_path)
    for image in modes():
        assert_same(processor([image]), reference([image], return_tensors="np"))


def test_pictures_lie_as_their_camera_says(tmp_path):
    """As transformers does with pictures that it opens itself."""
    tag = Image.Exif()
    reference = theirs("CLIP", {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 30}})
    processor = ours(reference, tmp_path)
    for orientation in range(1, 9):
        tag[0x0112] = orientation
        picture((40, 50)).save(tmp_path / "turned.png", exif=tag)
        expected = reference(load_image(str(tmp_path / "turned.png")), return_tensors="np")
        assert_same(processor([Image.open(tmp_path / "turned.png")]), expected)


def test_sixteen_bits_of_grey_are_scaled():
    values = np.arange(0, 65536, 13, dtype=np.uint16)[:5000].reshape(50, 100)
    found = rgb(Image.fromarray(values))
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))
    swapped = Image.frombytes("I;16B", (100, 50), values.byteswap().tobytes())
    np.testing.assert_array_equal(rgb(swapped), found)


def test_the_original_llavas_square():
    """Its `expand2square` pastes a picture into the colour of the mean; then CLIP's processor goes on."""
    fields = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64} | MEAN
    padded = read_processor(fields, "").padded()
    for shape in SHAPES:
        image = picture(shape)
        side = max(shape)
        square = Image.new("RGB", (side, side), tuple(int(part * 255) for part in MEAN["image_mean"]))
        square.paste(image, ((side - shape[1]) // 2, (side - shape[0]) // 2))
        np.testing.assert_array_equal(
            padded([image])["pixel_values"], read_processor(fields, "")([square])["pixel_values"]
        )


def test_files_of_every_age(tmp_path):
    """Suffixes, the old feature extractors, numbers for sizes, nulls, fields left out, and whole models' one file."""
    clip = read_processor({"image_processor_type": "CLIPImageProcessor"}, "")
    assert clip.size == 224 and clip.crop == (224, 224) and clip.normalise.mean[0] == 0.48145466
    for name in ("CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPImageProcessor"):
        assert read_processor({"image_processor_type": name, "do_resize": None, "size": None}, "") == clip
    early = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    assert read_processor(early, "") == clip
    for name in PROCESSORS:
        reference = getattr(transformers, f"{name}Pil")()
        reference.save_pretrained(tmp_path)
        assert read_processor({"image_processor_type": name}, "") == load_processor(tmp_path), name
    inside = {"image_processor": {"image_processor_type": "SiglipImageProcessor"}, "processor_class": "LlavaProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(inside))
    assert load_processor(tmp_path).normalise == Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("fields, message", [
    ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported; known: CLIPImageProcessor"),
    ({}, "image_processor_type '' is not supported"),
    ({"size": {"longest_edge": 5}}, "size {'longest_edge': 5} is not supported"),
    ({"size": 0}, "size 0 is not supported"),
    ({"size": {"height": "5", "width": 5}}, "size '5' is not supported"),
    ({"image_mean": [0.5]}, "image_mean .* must be three numbers"),
    ({"resample": 9}, "resample 9 is not supported"),
    ({"rescale_factor": "1"}, "rescale_factor '1'"),
    ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[5]]}, "image_grid_pinpoints"),
    ({"image_processor_type": "Idefics3ImageProcessor", "max_image_size": 5}, "max_image_size 5 .* longest_edge alone"),
])  # fmt: skip
def test_fields_that_are_refused(fields, message):
    known = {"image_processor_type": "CLIPImageProcessor"} if len(fields) == 1 and "type" not in str(fields) else {}
    with pytest.raises(InputError, match=message) as caught:
        read_processor(known | fields, "preprocessor_config.json")
    assert "\n" not in str(caught.value)


def test_pictures_that_are_refused(tmp_path):
    clip = read_processor({"image_processor_type": "CLIPImageProcessor"}, "")
    picture((300, 300)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused = [
        ([Image.open(tmp_path / "cut.png")], "cannot read an image"),
        ([Image.new("RGB", (0, 5))], "0 x 5 pixels"),
        ([Image.new("RGB", (1, 20000))], "would be scaled to 4480000 x 224"),
        ([], "no size at all"),
    ]
    for images, message in refused:
        with pytest.raises(InputError, match=message) as caught:
            clip(images)
        assert "\n" not in str(caught.value)
    loose = read_processor({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "")
    with pytest.raises(InputError, match="224 x 224, 224 x 448 pixels, not at one size"):
        loose([Image.new("RGB", (5, 5)), Image.new("RGB", (10, 5))])
    with pytest.raises(InputError, match="no images"):
        read_processor({"image_processor_type": "SmolVLMImageProcessor"}, "")([])
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        load_processor(tmp_path)
