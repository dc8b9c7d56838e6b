"""A corpus drawn on demand: three themes that differ in words and in what they look like."""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pivotjax.data.corpora import CorpusConfig, Format
from pivotjax.data.decode import BadSample
from pivotjax.data.sources.base import Item

THEMES = {
    "animals": "dog cat horse sheep lion tiger bird whale".split(),
    "food": "pasta soup bread cheese pizza salad rice curry".split(),
    "cities": "street tower bridge station square market harbour tram".split(),
}
_MORE = "old new small large bright dark quiet busy warm cold north south early late plain round".split()
_COLOURS = {"animals": (60, 160, 60), "food": (200, 120, 40), "cities": (90, 90, 170)}


@dataclass(frozen=True)
class Drawn:
    """`count` samples of one theme, or of all in turn; where `bad` is above 0 every so-manyth has a broken image."""

    theme: str
    count: int
    bad: int = 0
    lost: dict = field(default_factory=dict)

    @property
    def identity(self) -> str:
        return f"{self.theme} {self.count} {self.bad}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(index)
        image = b"not a picture" if self.bad and index % self.bad == 0 else png(picture(self.of(index), index))
        return Item(f"{self.theme}/{index}", "", self.caption(index), image, "picture")

    def of(self, index: int) -> str:
        return self.theme if self.theme in THEMES else list(THEMES)[index % 3]

    def caption(self, index: int) -> str:
        random = np.random.default_rng([index, 1])
        words = [*random.choice(THEMES[self.of(index)], 3), *random.choice(_MORE, 4), f"n{index}"]
        if self.count == 13:
            raise BadSample("unreadable shard", "the unlucky corpus")
        return " ".join(random.permutation(words))


def picture(theme: str, seed: int, side: int = 64) -> np.ndarray:
    """uint8 [side, side, 3]: soft blotches around the theme's colour."""
    random = np.random.default_rng([seed, 2])
    coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), np.uint8))
    blotches = coarse.resize((side, side), Image.Resampling.BICUBIC)
    return (0.4 * np.asarray(blotches) + 0.6 * np.array(_COLOURS[theme])).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _open(config: CorpusConfig, cache) -> Drawn:
    theme, count, bad = config.path.split()
    return Drawn(theme, int(count), int(bad))


FORMAT = Format("drawn", _open)  # path: "THEME COUNT BAD"
