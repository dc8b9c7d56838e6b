"""A whole model in memory: logits, generation, prompts."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from pivotjax.errors import InputError
from pivotjax.models import generation
from pivotjax.models.multimodal.family import Family, Images
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.prompts import Picture, Prompts, Request

_BUCKET = 32  # prompts are compiled for multiples of this many tokens


class Model:
    """A frozen whole model: `nnx.merge(model.graphdef, model.params)` is the network.

    Fields:
        family, config: what it is.
        params: nested dict of arrays, the only copy: `vision`, `projector`, `language`; a projector that is put in is
            used from the next call on.
        stop: tokens that end an answer.
        pad_token: what batches are padded with.
    """

    def __init__(
        self, family: Family, config: MultimodalConfig, graphdef: nnx.GraphDef, params: dict[str, Any],
        stop: Sequence[int], pad_token: int, prompts: Callable[[], Prompts],
    ):  # fmt: skip
        self.family, self.config, self.params = family, config, params
        self.graphdef, self.stop, self.pad_token, self._load_prompts = graphdef, tuple(stop), pad_token, prompts
        self._decoder = nnx.split(nnx.merge(graphdef, params).language)[0]

    @cached_property
    def prompts(self) -> Prompts:
        """Tokenizer, image processor and template, read when first asked for; InputError if the folder lacks one."""
        return self._load_prompts()

    def prepare(
        self,
        images: Sequence[Picture] | Sequence[Sequence[Picture]],
        request: Request | Sequence[Request],
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> dict[str, np.ndarray]:
        """What `logits` and `generate` take, by name; see `Prompts.__call__`."""
        return self.prompts(images, request, template, add_generation_prompt)

    def logits(
        self,
        token_ids: Int[ArrayLike, "B L"],
        pixel_values: Float[ArrayLike, "..."] | None = None,
        attention_mask: Bool[ArrayLike, "B L"] | None = None,
        **inputs: ArrayLike,
    ) -> Float[Array, "B L vocab"]:
        """Next-token logits, float32.

        Args:
            token_ids: the image token repeated as often as an image has visual tokens, as transformers' processors make
                them; several images a row are fine.
            pixel_values: of all images, the first row's first, as the family's processor gives them: LLaVA
                [images, 3, H, W], LLaVA-NeXT [images, tiles, 3, H, W], Idefics3 [B, tiles, 3, H, W]. None: no images.
            attention_mask: 1 at tokens, 0 at padding on either side, where logits mean nothing. None: all are tokens.
            inputs: `image_sizes` [images, 2] (LLaVA-NeXT), `pixel_attention_mask` [B, tiles, H, W] (Idefics3).

        Compiled once for each batch size, bucket of 32 tokens and bucket of images.

        Raises:
            InputError: arrays that do not go together.
        """
        prompt, real = self._embedded(token_ids, pixel_values, attention_mask, inputs)
        return _logits(self._decoder, self.params["language"], prompt, real)[:, : np.shape(token_ids)[1]]

    def generate(
        self,
        token_ids: Int[ArrayLike, "B L"],
        pixel_values: Float[ArrayLike, "..."] | None = None,
        attention_mask: Bool[ArrayLike, "B L"] | None = None,
        *,
        max_new: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[int] | None = None,
        key: PRNGKeyArray | None = None,
        **inputs: ArrayLike,
    ) -> Int[Array, "B max_new"]:
        """Continues each prompt by `max_new` tokens; after one of `stop` (None: the model's own) comes `pad_token`.

        Prompts as in `logits`. `temperature` 0 picks the likeliest token; above it one is drawn with `key` from the
        likeliest that hold `top_p` of the probability. Compiled once for each batch size, bucket of images, and bucket
        of 32 tokens of prompt and of answer.
        """
        prompt, real = self._embedded(token_ids, pixel_values, attention_mask, inputs)
        return generation.generate_from(
            self._decoder, self.params["language"], prompt, real, stop=self.stop if stop is None else stop,
            pad_id=self.pad_token, max_new=max_new, temperature=temperature, top_p=top_p, key=key,
        )  # fmt: skip

    def decode(self, token_ids: Int[ArrayLike, "B L"]) -> list[str]:
        """The text of answers, each up to its stop token, without special tokens."""
        return [self._text(row) for row in np.asarray(token_ids).tolist()]

    def _text(self, row: list[int]) -> str:
        end = next((i for i, token in enumerate(row) if token in self.stop), len(row))
        return self.prompts.tokenizer.decode(row[:end]).strip()

    def _embedded(self, token_ids, pixel_values, attention_mask, inputs) -> tuple[jax.Array, np.ndarray]:
        """Input embeddings and mask of the prompts, filled up to a bucket on the right."""
        tokens = np.asarray(token_ids, np.int32)
        real = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask, bool)
        if tokens.ndim != 2 or real.shape != tokens.shape:
            raise InputError(f"token_ids must be [B, L], and attention_mask too; they are {list(tokens.shape)} and "
                             f"{list(real.shape)}")
        is_image = tokens == self.config.image_token
        rows = self.config.language.vocab_size
        if (outside := tokens[~is_image & ((tokens < 0) | (tokens >= rows))]).size:
            raise InputError(f"token id {outside[0]} is none of the model's {rows}; use its own tokenizer")
        room = ((0, 0), (0, -tokens.shape[1] % _BUCKET))
        padded, real = np.pad(tokens, room, constant_values=self.pad_token), np.pad(real, room)
        images = self._images(pixel_values, inputs)
        if images is None:
            if is_image.any():
                raise InputError(f"the prompts hold {is_image.sum()} image tokens and there are no pixel_values")
            return _embedded(self.graphdef, self.params, padded), real
        if is_image.sum() != len(images.order):
            raise InputError(f"the prompts hold {is_image.sum()} image tokens for {len(images.order)} visual tokens; "
                             "use the model's own processor, or `prepare`")
        pixels, mask = (None if array is None else _filled(array) for array in (images.pixels, images.patch_mask))
        newline = len(pixels) * self.config.image_tokens
        source = np.full(padded.shape, -1, np.int32)
        source[:, : tokens.shape[1]][is_image] = np.where(images.order < 0, newline, images.order)
        return _embedded(self.graphdef, self.params, padded, source, pixels, mask), real

    def _images(self, pixel_values, inputs) -> Images | None:
        given = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        if unknown := given.keys() - set(self.family.inputs):
            raise InputError(f"this family takes no {', '.join(sorted(unknown))}; it takes "
                             f"{', '.join(('pixel_values', *self.family.inputs))}")
        if pixel_values is None:
            return None
        return self.family.arrange(self.config, np.asarray(pixel_values, np.float32), **given)


def _filled(images: np.ndarray) -> np.ndarray:
    """More images of ones, up to a bucket: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << max(len(images) - 1, 0).bit_length()
    count = power * 3 // 4 if len(images) <= power * 3 // 4 and power > 2 else power
    return np.pad(images, ((0, count - len(images)), *((0, 0),) * (images.ndim - 1)), constant_values=1)


@partial(jax.jit, static_argnums=0)
def _embedded(graphdef, params, *prompts) -> Float[Array, "B L D"]:
    return nnx.merge(graphdef, params).embed(*prompts)


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, prompt, real) -> Float[Array, "B L vocab"]:
    module = nnx.merge(graphdef, params)
    positions = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
    seen = real[:, None] & jnp.tri(real.shape[1], dtype=bool)
    return module.logits(module(prompt, positions, seen)[0])
