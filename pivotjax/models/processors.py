"""Image preprocessing as transformers does it with Pillow, read from `preprocessor_config.json`.

A processor takes pictures of any mode and gives what a model's forward pass takes: float32 images, channels first.
Every picture becomes RGB first: turned as its camera says, transparency over white, 16 bits of grey scaled to 8.
(transformers turns only pictures that it opens itself, and cuts 16 bits of grey off at 255: little but white is left.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from pivotjax.errors import InputError
from pivotjax.files import read_json

Pixels = UInt8[np.ndarray, "H W 3"]

FILE, WHOLE_FILE = "preprocessor_config.json", "processor_config.json"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_LONGEST = 4096  # pixels: Idefics3 scales no edge beyond it
_MOST_PIXELS = 1 << 27  # of one picture while it is worked on
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that the decoders raise


@dataclass(frozen=True)
class Normalisation:
    """uint8 pixels to what a network takes: `(pixels * factor - mean) / std`."""

    factor: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __call__(self, pixels: Pixels) -> Float32[np.ndarray, "3 H W"]:
        """Channels last to channels first."""
        scaled = (np.moveaxis(pixels, -1, 0) * np.float64(self.factor)).astype(np.float32)
        mean, std = (np.array(part, np.float32)[:, None, None] for part in (self.mean, self.std))
        return (scaled - mean) / std


@dataclass(frozen=True)
class Processor:
    """CLIP, SigLIP and LLaVA-1.5: every picture becomes one image of one size.

    Fields:
        normalise: what happens to pixels last.
        resample: Pillow's filter.
        size: pixels of the shorter edge, or (height, width); None: not resized.
        crop: (height, width) cut from the middle, black where there is no picture; None: not cropped.
        square: colour in which pictures are first padded to squares; None: not padded.
    """

    normalise: Normalisation
    resample: int
    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    square: tuple[int, ...] | None = None

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` [B, 3, H, W]. InputError if the pictures come out at different sizes."""
        return {"pixel_values": _stacked([self.normalise(self.fitted(rgb(image))) for image in images])}

    def fitted(self, pixels: Pixels) -> Pixels:
        """Padded, resized and cropped."""
        return np.asarray(self.fit(Image.fromarray(pixels)))

    def fit(self, image: Image.Image) -> Image.Image:
        """The same from RGB to RGB, without a copy of the whole picture as an array."""
        if self.square is not None:
            image = _squared(image, self.square)
        if self.size is not None:
            image = _resize(image, self._target(image.height, image.width), self.resample)
        return image if self.crop is None else _cropped(image, self.crop)

    def padded(self) -> "Processor":
        """The same behind the original LLaVA's `image_aspect_ratio: pad`: squares in the colour of the mean."""
        return replace(self, square=tuple(int(part * 255) for part in self.normalise.mean))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted((height, width))
        edges = (self.size, int(self.size * long / short))
        return edges if height <= width else edges[::-1]


@dataclass(frozen=True)
class AnyResolutionProcessor:
    """LLaVA-NeXT: the whole picture at the tower's size, and tiles of it at the best of several resolutions.

    Fields:
        single: what becomes of the whole and of every tile.
        whole: (height, width) of the whole.
        tile: edge of the tiles.
        resolutions: (height, width) of what a picture may be fitted into.
    """

    single: Processor
    whole: tuple[int, int]
    tile: int
    resolutions: tuple[tuple[int, int], ...]

    @property
    def normalise(self) -> Normalisation:
        """What happens to pixels last."""
        return self.single.normalise

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` [B, N, 3, H, W]: the whole, then the tiles row by row; zeros where a picture has fewer than
        the others. `image_sizes` [B, 2]: the pictures' heights and widths."""
        pictures = [rgb(image) for image in images]
        found = [_stacked([self.normalise(self.single.fitted(one)) for one in self._views(p)]) for p in pictures]
        filled = np.zeros((len(found), max(map(len, found), default=0), *_one_shape(found)[1:]), np.float32)
        for place, views in zip(filled, found):
            place[: len(views)] = views
        return {"pixel_values": filled, "image_sizes": np.array([pixels.shape[:2] for pixels in pictures])}

    def _views(self, pixels: Pixels) -> list[Pixels]:
        resample, size = self.single.resample, pixels.shape[:2]
        room = best_resolution(size, self.resolutions)
        inside = _resized(pixels, fit_within(size, room), resample)
        top, left = ((room[axis] - inside.shape[axis]) // 2 for axis in (0, 1))
        canvas = np.zeros((*room, 3), np.uint8)
        canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return [_resized(pixels, self.whole, resample), *_cut(canvas, self.tile)]


def best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """LLaVA-NeXT's choice for a picture of (height, width): where most of its pixels survive, then least is wasted."""

    def merit(room: tuple[int, int]) -> tuple[int, int]:
        scale = min(room[1] / size[1], room[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - room[0] * room[1]

    return max(resolutions, key=merit)


def fit_within(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) to which LLaVA-NeXT scales a picture so that it just fits into `room`."""
    down, across = room[0] / size[0], room[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), room[0]), room[1]
    return room[0], min(math.ceil(size[1] * down), room[1])


@dataclass(frozen=True)
class TilingProcessor:
    """Idefics3 and SmolVLM: tiles of one size and, after them, the whole picture at that size.

    Fields:
        normalise: what happens to pixels last.
        resample: Pillow's filter.
        longest: pixels to which the longer edge is scaled first; None: not scaled.
        tile: edge of the tiles.
        split: whether there are tiles; if not, a picture is just made `tile` x `tile`.
    """

    normalise: Normalisation
    resample: int
    longest: int | None
    tile: int
    split: bool

    def __call__(self, images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """For one sample of several pictures, or for several samples (a sequence for each).

        `pixel_values` [B, N, 3, H, W]: a sample's pictures one after the other, each as its tiles row by row and the
        whole; zeros fill up to the sample with the most. `pixel_attention_mask` [B, N, H, W], int64: 1 at pictures, 0
        at filling. `rows`, `cols`: lists of how many tiles each picture of each sample has, 0 where it has none.
        """
        samples = [images] if all(isinstance(one, Image.Image) for one in images) else images
        split = [[self._tiles(rgb(image)) for image in sample] for sample in samples]
        flat = [[self.normalise(tile) for _, tiles in sample for tile in tiles] for sample in split]
        shapes = [tile.shape for tiles in flat for tile in tiles]
        if not shapes:
            raise InputError("there are no images to process; give at least one")
        height, width = (max(shape[axis] for shape in shapes) for axis in (1, 2))
        pixels = np.zeros((len(flat), max(map(len, flat)), 3, height, width), np.float32)
        mask = np.zeros((*pixels.shape[:2], height, width), np.int64)
        for sample, tiles in enumerate(flat):
            for place, tile in enumerate(tiles):
                pixels[sample, place, :, : tile.shape[1], : tile.shape[2]] = tile
                mask[sample, place, : tile.shape[1], : tile.shape[2]] = 1
        rows, cols = ([[grid[axis] for grid, _ in sample] for sample in split] for axis in (0, 1))
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "rows": rows, "cols": cols}

    def _tiles(self, pixels: Pixels) -> tuple[tuple[int, int], list[Pixels]]:
        """(rows, columns) of tiles, and the tiles with the whole behind them."""
        if self.longest is not None:
            pixels = _resized(pixels, self._scaled(*pixels.shape[:2]), self.resample)
        whole = (self.tile, self.tile)
        if not self.split:
            return (0, 0), [_resized(pixels, whole, self.resample)]
        pixels = _resized(pixels, self._whole_tiles(*pixels.shape[:2]), self.resample)
        grid = (pixels.shape[0] // self.tile, pixels.shape[1] // self.tile)
        if grid == (1, 1):
            return (0, 0), [pixels]
        return grid, [*_cut(pixels, self.tile), _resized(pixels, whole, self.resample)]

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """The longer edge `longest`, the other even; then both below Idefics3's limit."""
        height, width = _with_longer_edge(height, width, self.longest, even=True)
        if max(height, width) > _LONGEST:
            height, width = _with_longer_edge(height, width, _LONGEST)
        return height, width

    def _whole_tiles(self, height: int, width: int) -> tuple[int, int]:
        """The longer edge rounded up to whole tiles, then the other, in its proportion, as well."""
        longer = math.ceil(max(height, width) / self.tile) * self.tile
        height, width = _with_longer_edge(height, width, longer)
        return math.ceil(height / self.tile) * self.tile, math.ceil(width / self.tile) * self.tile


def _with_longer_edge(height: int, width: int, longer: int, even: bool = False) -> tuple[int, int]:
    """The same proportions, the other edge rounded down (to the next even number up, where `even`), at least 1."""
    ratio = width / height
    other = int(longer / ratio) if width >= height else int(longer * ratio)
    other = max(other + (other % 2 if even else 0), 1)
    return (other, longer) if width >= height else (longer, other)


@dataclass(frozen=True)
class PatchProcessor:
    """SigLIP 2 NaFlex: a picture as patches, as many as there may be at its own proportions.

    Fields:
        normalise: what happens to pixels last.
        resample: Pillow's filter.
        resize: whether pictures are scaled; if not, only their whole patches are taken.
        patch: edge of the patches.
        most: patches that a picture may have, and that the result has room for.
    """

    normalise: Normalisation
    resample: int
    resize: bool
    patch: int
    most: int

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` [B, most, patch * patch * 3]: patches row by row, then zeros; `pixel_attention_mask`
        [B, most], int32: 1 at patches; `spatial_shapes` [B, 2]: rows and columns of patches. InputError where they are
        too many."""
        found = np.zeros((len(images), self.most, 3 * self.patch**2), np.float32)
        mask, grids = np.zeros((len(images), self.most), np.int32), np.zeros((len(images), 2), np.int64)
        for number, image in enumerate(images):
            pixels = rgb(image)
            if self.resize:
                pixels = _resized(pixels, self._target(*pixels.shape[:2]), self.resample)
            rows, columns = grids[number] = pixels.shape[0] // self.patch, pixels.shape[1] // self.patch
            if not 0 < rows * columns <= self.most:
                raise InputError(f"a picture has {rows} x {columns} patches, not 1 to {self.most}; resize it first")
            whole = self.normalise(pixels[: rows * self.patch, : columns * self.patch])
            patches = whole.reshape(3, rows, self.patch, columns, self.patch).transpose(1, 3, 2, 4, 0)
            found[number, : rows * columns] = patches.reshape(rows * columns, -1)
            mask[number, : rows * columns] = 1
        return {"pixel_values": found, "pixel_attention_mask": mask, "spatial_shapes": grids}

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """The largest size of whole patches, by halving the interval of possible scales."""

        def scaled(scale: float) -> tuple[int, int]:
            return tuple(max(1, math.ceil(edge * scale / self.patch)) * self.patch for edge in (height, width))

        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            middle = (low + high) / 2
            fits = math.prod(scaled(middle)) <= self.most * self.patch**2
            low, high = (middle, high) if fits else (low, middle)
        return scaled(low)


AnyProcessor = Processor | AnyResolutionProcessor | TilingProcessor | PatchProcessor


def rgb(image: Image.Image) -> Pixels:
    """A picture of any mode as uint8, upright, its transparent parts white. InputError where it cannot be decoded."""
    try:
        pixels = np.asarray(flat(ImageOps.exif_transpose(image)))
    except _BROKEN as error:
        why = str(error).replace("\n", " ")[:200] or type(error).__name__
        raise InputError(f"cannot read an image: {why}; give a whole picture") from error
    if not pixels.size:
        raise InputError(f"an image has {image.width} x {image.height} pixels; give one with at least one")
    return pixels


def flat(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, its transparent parts white, 16 bits of grey scaled to 8; RGB itself as it is."""
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _resized(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    return np.asarray(_resize(Image.fromarray(pixels), size, resample))


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    height, width = size
    if height * width > _MOST_PIXELS:
        found = f"{image.height} x {image.width}"
        raise InputError(f"an image of {found} pixels would be scaled to {height} x {width}; cut it shorter first")
    return image.resize((width, height), resample)


def _squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle; where the picture is smaller, it in the middle of black, the odd pixel before it."""
    height, width = size
    left, top = _before(image.width, width), _before(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _before(found: int, wanted: int) -> int:
    """Where the middle begins; negative where it begins before the picture."""
    return (found - wanted) // 2 if found >= wanted else -((wanted - found + 1) // 2)


def _cut(pixels: Pixels, tile: int) -> list[Pixels]:
    """Tiles row by row; those at the end may be smaller."""
    height, width = pixels.shape[:2]
    return [pixels[i : i + tile, j : j + tile] for i in range(0, height, tile) for j in range(0, width, tile)]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    _one_shape(images)
    return np.stack(images)


def _one_shape(images: list[np.ndarray]) -> tuple[int, ...]:
    """That of one of them without its first axis' length; InputError if there are none or they differ."""
    shapes = sorted({image.shape[-2:] for image in images})
    if len(shapes) != 1:
        found = ", ".join(f"{height} x {width}" for height, width in shapes) or "no size at all"
        raise InputError(f"the images come out at {found} pixels, not at one size; process them one by one")
    return images[0].shape


def load_processor(folder: Path) -> AnyProcessor:
    """The processor of a model's folder: of `processor_config.json` (newer whole models) or `preprocessor_config.json`.

    InputError if there is none, or one that is not supported.
    """
    whole, own = epath.Path(folder) / WHOLE_FILE, epath.Path(folder) / FILE
    settings = read_json(whole).get("image_processor") if whole.is_file() else None
    if settings:
        return read_processor(settings, str(whole))
    if not own.is_file():
        raise InputError(f"{folder} has no {FILE}; copy it from where the model came from")
    return read_processor(read_json(own), str(own))


def read_processor(settings: Mapping[str, Any], where: str) -> AnyProcessor:
    """The processor that the fields of `preprocessor_config.json` describe; those left out are the class's own.

    InputError names a field that is not supported.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = str(named).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        raise InputError(f"{where}: image_processor_type {named!r} is not supported; known: {known}")
    return PROCESSORS[kind](_Fields(settings, where))


class _Fields:
    """Fields with their defaults; null means left out, as in transformers."""

    def __init__(self, settings: Mapping[str, Any], where: str):
        self._settings, self._where = settings, where

    def get(self, name: str, default: Any) -> Any:
        value = self._settings.get(name)
        return default if value is None else value

    def normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
        factor = self._number("rescale_factor", 1 / 255) if self.get("do_rescale", True) else 1.0
        if not self.get("do_normalize", True):
            return Normalisation(factor)
        return Normalisation(factor, self.colour("image_mean", mean), self.colour("image_std", std))

    def colour(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Three numbers, or one for all three."""
        value = self.get(name, default)
        value = [value] * 3 if isinstance(value, int | float) else value
        if len(value) != 3 or not all(isinstance(part, int | float) for part in value):
            raise self.wrong(name, value, "three numbers")
        return tuple(map(float, value))

    def resample(self, default: int) -> int:
        value = self.get("resample", default)
        if value not in list(Image.Resampling):
            raise self.wrong("resample", value, f"one of {[int(one) for one in Image.Resampling]}")
        return int(value)

    def pixels(self, name: str, default: Any) -> int:
        """A number of pixels or patches."""
        return self._whole(name, self.get(name, default))

    def edge(self, name: str, key: str, default: int) -> int:
        """`{key: pixels}`."""
        value = self.get(name, {key: default})
        if not isinstance(value, Mapping) or list(value) != [key]:
            raise self.wrong(name, value, f"a mapping with {key} alone")
        return self._whole(name, value[key])

    def size(self, name: str, default: int | tuple[int, int]) -> int | tuple[int, int]:
        """The shorter edge, or (height, width)."""
        value = self.get(name, default)
        if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
            value = value["shortest_edge"]
        if isinstance(value, Mapping) and set(value) == {"height", "width"}:
            value = (value["height"], value["width"])
        if isinstance(value, list | tuple) and len(value) == 2:
            return self._whole(name, value[0]), self._whole(name, value[1])
        return self._whole(name, value)

    def box(self, name: str, default: int) -> tuple[int, int]:
        """(height, width); one number is a square."""
        value = self.size(name, default)
        return value if isinstance(value, tuple) else (value, value)

    def boxes(self, name: str, default: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """A list of (height, width)."""
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or not value or any(len(box) != 2 for box in value):
            raise self.wrong(name, value, "a list of heights and widths")
        return tuple((self._whole(name, height), self._whole(name, width)) for height, width in value)

    def wrong(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self._where}: {name} {value!r} is not supported; it must be {wanted}")

    def _number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        return float(value)

    def _whole(self, name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= 1 << 16:
            raise self.wrong(name, value, "a number of pixels, or a mapping of them that is known")
        return value


def _clip(fields: _Fields) -> Processor:
    return Processor(
        fields.normalisation(_CLIP_MEAN, _CLIP_STD),
        fields.resample(Image.Resampling.BICUBIC),
        fields.size("size", 224) if fields.get("do_resize", True) else None,
        fields.box("crop_size", 224) if fields.get("do_center_crop", True) else None,
    )


def _siglip(fields: _Fields) -> Processor:
    return Processor(
        fields.normalisation(_HALF, _HALF),
        fields.resample(Image.Resampling.BICUBIC),
        fields.size("size", (224, 224)) if fields.get("do_resize", True) else None,
        fields.box("crop_size", 224) if fields.get("do_center_crop", False) else None,
    )


def _llava(fields: _Fields) -> Processor:
    mean = fields.colour("image_mean", _CLIP_MEAN)  # padding has its colour even where nothing is normalised
    square = tuple(int(part * 255) for part in mean) if fields.get("do_pad", False) else None
    return replace(_clip(fields), square=square)


def _llava_next(fields: _Fields) -> AnyResolutionProcessor:
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    return AnyResolutionProcessor(
        _clip(fields),
        fields.box("size", 224),
        fields.box("crop_size", 224)[0],
        fields.boxes("image_grid_pinpoints", pinpoints),
    )


def _idefics3(fields: _Fields) -> TilingProcessor:
    return TilingProcessor(
        fields.normalisation(_HALF, _HALF),
        fields.resample(Image.Resampling.LANCZOS),
        fields.edge("size", "longest_edge", 4 * 364) if fields.get("do_resize", True) else None,
        fields.edge("max_image_size", "longest_edge", 364),
        bool(fields.get("do_image_splitting", True)),
    )


def _naflex(fields: _Fields) -> PatchProcessor:
    return PatchProcessor(
        fields.normalisation(_HALF, _HALF),
        fields.resample(Image.Resampling.BILINEAR),
        bool(fields.get("do_resize", True)),
        fields.pixels("patch_size", 16),
        fields.pixels("max_num_patches", 256),
    )


# By `image_processor_type`, without what says how it is implemented (`Fast`, `Pil`).
PROCESSORS: dict[str, Callable[[_Fields], AnyProcessor]] = {
    "CLIPImageProcessor": _clip,
    "SiglipImageProcessor": _siglip,
    "Siglip2ImageProcessor": _naflex,
    "LlavaImageProcessor": _llava,
    "LlavaNextImageProcessor": _llava_next,
    "Idefics3ImageProcessor": _idefics3,
    "SmolVLMImageProcessor": _idefics3,
}
