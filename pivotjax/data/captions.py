"""Captions as token sequences: image placeholders, prompt, caption, end, with the targets of the caption alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from tokenizers import Tokenizer

from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.vlm import IMAGE_TOKEN


class Encoded(NamedTuple):
    """`tokens` are read by the decoder; `targets[t]` is predicted at sequence position `first_position + t`."""

    tokens: Int32[np.ndarray, " L"]
    targets: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]


@dataclass(frozen=True)
class Captioner:
    """Turns captions into `[image] * num_visual + prompt + caption + end`.

    `max_caption` (T) counts the end token. The last target is never an input, so a sequence has
    `length = num_visual + len(prompt) + T - 1` tokens, right-padded with the end token.
    """

    tokenizer: Tokenizer
    eos_id: int
    prompt: str = "\n"
    num_visual: int = 16
    max_caption: int = 12

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.prompt, add_special_tokens=False).ids)

    @property
    def first_position(self) -> int:
        """Where in the sequence the logits of the caption's first token stand."""
        return self.num_visual + len(self.prompt_ids) - 1

    @property
    def length(self) -> int:
        """Tokens of a sequence (L)."""
        return self.first_position + self.max_caption

    def caption_ids(self, caption: str) -> list[int]:
        """The caption's own tokens and the end token."""
        return [*self.tokenizer.encode(caption, add_special_tokens=False).ids, self.eos_id]

    def fits(self, caption: str) -> bool:
        """Whether the caption with its end token has at most `max_caption` tokens."""
        return len(self.caption_ids(caption)) <= self.max_caption

    def keep_fitting(self, items: Iterable[Item]) -> tuple[list[Item], int]:
        """The items whose captions fit, and how many do not."""
        fitting = [(item, self.fits(item.caption)) for item in items]
        kept = [item for item, fits in fitting if fits]
        return kept, len(fitting) - len(kept)

    def encode(self, caption: str) -> Encoded:
        """One caption; weights are 1 on its tokens and its end, 0 after. InputError where it does not fit."""
        ids = self.caption_ids(caption)
        if len(ids) > self.max_caption:
            raise InputError(f"caption {caption!r} has {len(ids)} tokens, over {self.max_caption}; shorten or drop it")
        padding = self.max_caption - len(ids)
        targets = ids + [self.eos_id] * padding
        tokens = [IMAGE_TOKEN] * self.num_visual + list(self.prompt_ids) + targets[:-1]
        weights = [1.0] * len(ids) + [0.0] * padding
        return Encoded(np.array(tokens, np.int32), np.array(targets, np.int32), np.array(weights, np.float32))
