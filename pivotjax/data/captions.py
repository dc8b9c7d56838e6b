"""Captions as token sequences: image placeholders, prompt, caption, end, with the targets of the caption alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from tokenizers import Tokenizer

from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.vlm import IMAGE_TOKEN

Template = Literal["prompt", "plain"]
LongCaptions = Literal["drop", "truncate"]
_PLAIN_END = "\n"  # of LLaVA's conversation `plain`


class Encoded(NamedTuple):
    """`tokens` are read by the decoder; `targets[t]` is predicted at sequence position `first_position + t`."""

    tokens: Int32[np.ndarray, " L"]
    targets: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]


@dataclass(frozen=True)
class Captioner:
    """Turns captions into sequences, by one of two templates.

    `prompt`: `[image] * num_visual + prompt + caption + end of sequence`. `plain`: as LLaVA's stage 1 tokenises
    (`preprocess_plain`), `bos + [image] * num_visual + caption + "\\n"`, where bos is what the tokenizer begins texts
    with (nothing, where it does not) and there is no end of sequence.

    `max_caption` (T) counts the end. The last target is never an input, so a sequence has
    `length = first_position + T` tokens, right-padded with the end-of-sequence token. `long_captions`: those that are
    longer do not fit (`drop`), or lose what is over, the end included, as LLaVA's do (`truncate`).
    """

    tokenizer: Tokenizer
    eos_id: int
    prompt: str = "\n"
    num_visual: int = 16
    max_caption: int = 12
    template: Template = "prompt"
    long_captions: LongCaptions = "drop"

    @property
    def identity(self) -> str:
        """What names the sequences' form, for checkpoints: the prompt, or the template that has none."""
        return self.prompt if self.template == "prompt" else self.template

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """Tokens before the image."""
        if self.template == "prompt":
            return ()
        return tuple(id_ for id_ in self.tokenizer.encode("").ids[:1] if id_ != self.eos_id)

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """Tokens between image and caption."""
        if self.template == "plain":
            return ()
        return tuple(self.tokenizer.encode(self.prompt, add_special_tokens=False).ids)

    @cached_property
    def head(self) -> Int32[np.ndarray, " H"]:
        """Every sequence's beginning: all that stands before the caption."""
        return np.array([*self.begin_ids, *[IMAGE_TOKEN] * self.num_visual, *self.prompt_ids], np.int32)

    @property
    def first_position(self) -> int:
        """Where in the sequence the logits of the caption's first token stand."""
        return len(self.head) - 1

    @property
    def length(self) -> int:
        """Tokens of a sequence (L)."""
        return self.first_position + self.max_caption

    def caption_ids(self, caption: str) -> list[int]:
        """The caption's own tokens and its end, cut to `max_caption` where long captions are truncated."""
        if self.template == "plain":
            ids = self.tokenizer.encode(caption + _PLAIN_END, add_special_tokens=False).ids
        else:
            ids = [*self.tokenizer.encode(caption, add_special_tokens=False).ids, self.eos_id]
        return ids[: self.max_caption] if self.long_captions == "truncate" else ids

    def own(self, text: str) -> str:
        """The caption in a text that a model wrote after `head`: of the plain template, what stands before its end."""
        return (text.strip().split(_PLAIN_END)[0] if self.template == "plain" else text).strip()

    def fits(self, caption: str) -> bool:
        """Whether the caption with its end has at most `max_caption` tokens, or is cut so that it has."""
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
        targets = np.full(self.max_caption, self.eos_id, np.int32)
        targets[: len(ids)] = ids
        weights = (np.arange(self.max_caption) < len(ids)).astype(np.float32)
        return Encoded(np.concatenate([self.head, targets[:-1]]), targets, weights)
