"""A corpus with its pictures decoded: what training without a cache of features reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from pivotjax.data.corpora import Corpus
from pivotjax.data.decode import BadSample, Decoded, decode_noted
from pivotjax.data.sources.base import Item
from pivotjax.data.stream import TOO_LONG, Sample
from pivotjax.models.processors import Processor

NonRGB = Literal["convert", "drop"]


@dataclass(frozen=True)
class Decoder:
    """How an item's bytes become pixels: `decode.decode_noted` with its options."""

    fit: Processor | None = None
    non_rgb: NonRGB = "convert"

    def __call__(self, item: Item, size: int) -> Decoded:
        return decode_noted(item, size, self.fit, self.non_rgb)

    def pixels(self, item: Item, size: int) -> UInt8[np.ndarray, "S S 3"]:
        """The picture alone."""
        return self(item, size).pixels


@dataclass(frozen=True)
class Pictures:
    """Random access to samples whose pictures are `size` x `size` pixels; `[i]` raises BadSample.

    `fits`: whether a caption is short enough. Where it is not, the reason is `TOO_LONG`, and no picture is read.
    """

    corpus: Corpus | Sequence[Item]
    name: str
    size: int
    decoder: Decoder = Decoder()
    fits: Callable[[str], bool] | None = None

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> Sample:
        if self.fits and not self.fits(self.corpus.caption(index)):
            raise BadSample(TOO_LONG, f"sample {index} of {self.name}")
        item = self.corpus[index]
        pixels, converted = self.decoder(item, self.size)
        return Sample(image=pixels, caption=item.caption, concept=item.concept, key=item.key, converted=converted)

    def key(self, index: int) -> str:
        """The sample's name; where it cannot be read any more, what is known of it."""
        try:
            return self.corpus[index].key
        except BadSample as bad:
            return str(bad)
