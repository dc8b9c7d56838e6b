"""Rows of a batch: one captioned image each, or several packed side by side, blind to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pivotjax.data.captions import Captioner
from pivotjax.errors import InputError


@dataclass(frozen=True)
class Rows:
    """How `images` (I) samples become one row of `length` (L) tokens with `targets` (T) caption tokens to predict.

    A row of one sample is the captioner's sequence, padded. A packed row holds its samples' sequences one after the
    other without padding between them; where they are together longer than `row_tokens` (0: room for the longest that
    can be), the longest captions are cut.
    """

    captioner: Captioner
    images: int = 1
    row_tokens: int = 0

    def __post_init__(self) -> None:
        if self.images == 1 and self.row_tokens:
            raise InputError("row_tokens is for packed rows; set pack to 2 or more, or leave it out")
        least = self.images * (len(self.captioner.head) + 1)
        if self.row_tokens and self.row_tokens < least:
            raise InputError(
                f"row_tokens {self.row_tokens} has no room for {self.images} images of {self.captioner.num_visual} "
                f"visual tokens with a caption each; give at least {least}"
            )

    @property
    def length(self) -> int:
        """Tokens of a row (L)."""
        return self._sizes[0]

    @property
    def targets(self) -> int:
        """Caption tokens that a row has room for (T)."""
        return self._sizes[1]

    @property
    def _sizes(self) -> tuple[int, int]:
        return sizes(self.captioner.first_position, self.captioner.max_caption, self.images, self.row_tokens)

    def row(self, captions: Sequence[list[int]]) -> tuple[dict[str, np.ndarray], int]:
        """The row of `images` captions, as `Captioner.caption_ids` gives them, and how many of them were cut.

        `tokens` int32 [L], `targets`, `places` int32 [T], `weights` float32 [T]; of a packed row also `segments` (1, 2,
        ... a sample each, 0 at padding) and `positions` (within the segment), int32 [L].
        """
        first, pad = self.captioner.first_position, self.captioner.eos_id
        kept = _cut(captions, self.length - self.images * first)
        row = {
            "tokens": np.full(self.length, pad, np.int32),
            "targets": np.full(self.targets, pad, np.int32),
            "places": np.zeros(self.targets, np.int32),
            "weights": np.zeros(self.targets, np.float32),
        }
        if self.images == 1:
            row["places"][:] = first + np.arange(self.targets)
        else:
            row |= {"segments": np.zeros(self.length, np.int32), "positions": np.zeros(self.length, np.int32)}
        start = target = 0
        for segment, (ids, count) in enumerate(zip(captions, kept), 1):
            self._place(row, segment, start, target, ids[:count])
            start, target = start + first + count, target + count
        return row, sum(count < len(ids) for ids, count in zip(captions, kept))

    def _place(self, row: dict[str, np.ndarray], segment: int, start: int, target: int, ids: list[int]) -> None:
        """Writes one sample's sequence from token `start` on, and its caption from target `target` on."""
        first, own = self.captioner.first_position, slice(target, target + len(ids))
        end = start + first + len(ids)  # the last target is never an input
        row["tokens"][start : start + first + 1] = self.captioner.head
        row["tokens"][start + first + 1 : end] = ids[:-1]
        row["targets"][own] = ids
        row["places"][own] = start + first + np.arange(len(ids))
        row["weights"][own] = 1
        if self.images > 1:
            row["segments"][start:end] = segment
            row["positions"][start:end] = np.arange(end - start)


def sizes(first_position: int, max_caption: int, images: int, row_tokens: int) -> tuple[int, int]:
    """Tokens of a row (L), and caption tokens that it has room for (T); the arguments are `Captioner`'s and `Rows`'."""
    length = row_tokens or images * (first_position + max_caption)
    return length, min(length - images * first_position, images * max_caption)


def _cut(captions: Sequence[list[int]], room: int) -> list[int]:
    """How many tokens each caption keeps so that all fit into `room`: the longest give way, down to one length."""
    kept = [len(ids) for ids in captions]
    while sum(kept) > room:
        longest = kept.index(max(kept))
        kept[longest] -= 1
    return kept
