"""One network for the whole multimodal models: a vision tower, a projector, a decoder.

What a family adds is a field of the config. The parameters are `{"vision": ..., "projector": ..., "language": ...}`,
and `image_newline` where images are cut into tiles that are put together again.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pivotjax.models import connectors, language, projector, vision
from pivotjax.models.language import DecoderConfig
from pivotjax.models.vision import VisionConfig


@dataclass(frozen=True)
class MultimodalConfig:
    """The parts of a whole model and how they are joined.

    Fields:
        language_type, vision_type: the parts' families. A model of text alone has no tower.
        image_token: the id that stands where an image's tokens go.
        depths: layers of the tower after which hidden states are taken, laid side by side along the channels.
        connector: the projector's kind, its spatial reduction included.
        connector_bias: its layers have one.
        final_norm: the tower's last norm comes after them.
        drop_first: without the first token of each image (CLIP's class token).
        grids: heights and widths in pixels, one of which an image is brought to and cut up (LLaVA-NeXT); empty: it is
            not cut up so.
    """

    language_type: str
    language: DecoderConfig
    image_token: int | None = None
    vision_type: str | None = None
    vision: VisionConfig | None = None
    depths: tuple[int, ...] = ()
    connector: str = "linear"
    connector_bias: bool = True
    final_norm: bool = False
    drop_first: bool = False
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def tower_tokens(self) -> int:
        """Tokens of one image or tile of the tower's `image_size`, before the projector."""
        return self.vision.num_patches + self.vision.has_class_token - self.drop_first

    @property
    def image_tokens(self) -> int:
        """Tokens of one image or tile of the tower's `image_size`, where the decoder sees them."""
        return connectors.num_tokens(self.connector, self.tower_tokens)


class Multimodal(nnx.Module):
    """The network; parameters and compute in `dtype`, as its parts have it."""

    def __init__(self, config: MultimodalConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        if config.vision is not None:
            self.vision = vision.FAMILIES[config.vision_type].module(config.vision, dtype=dtype, rngs=rngs)
            self.projector = _projector(config, dtype, rngs)
        self.language = language.FAMILIES[config.language_type].module(config.language, dtype=dtype, rngs=rngs)
        if config.grids:
            self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (config.language.dim,), dtype))

    def visual_tokens(
        self, pixels: Float[Array, "N 3 H W"], patch_mask: Bool[Array, "N h w"] | None = None
    ) -> Float[Array, "N T D"]:
        """Visual tokens of normalised images, in the decoder's input space."""
        config, pixels = self.config, pixels.transpose(0, 2, 3, 1)
        seen = jnp.concatenate([self.vision(pixels, patch_mask, depth=depth) for depth in config.depths], axis=-1)
        if config.final_norm:
            seen = self.vision.final_norm(seen)
        seen = seen[:, 1:] if config.drop_first else seen
        params = nnx.to_pure_dict(nnx.state(self.projector))
        return connectors.apply(config.connector, params, seen.astype(params["linear_0"]["kernel"].dtype))

    def embed(
        self,
        tokens: Int[Array, "B L"],
        source: Int[Array, "B L"] | None = None,
        pixels: Float[Array, "N 3 H W"] | None = None,
        patch_mask: Bool[Array, "N h w"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Input embeddings of prompts. `source` is -1 at text, elsewhere the number of a visual token.

        Numbers count the tokens of all images; behind them, where there is one, comes the newline. Without images all
        is text.
        """
        if pixels is None:
            return self.language.embed(tokens)
        text = self.language.embed(jnp.where(source < 0, tokens, 0))
        visual = self.visual_tokens(pixels, patch_mask)
        visual = visual.reshape(-1, visual.shape[-1])
        if self.config.grids:
            visual = jnp.concatenate([visual, self.image_newline[...][None]])
        return jnp.where(source[..., None] < 0, text, visual[source].astype(text.dtype))


def _projector(config: MultimodalConfig, dtype, rngs: nnx.Rngs) -> nnx.Dict:
    """The projector's parameters, `linear_0` and so on, as a part of a module."""
    d_in = connectors.width(config.connector, config.vision.dim * len(config.depths))
    params = projector.init(config.connector, d_in, config.language.dim, rngs.params(), output_std=1.0)
    return nnx.Dict({
        name: nnx.Dict({part: nnx.Param(value.astype(dtype)) for part, value in layer.items()
                        if part == "kernel" or config.connector_bias})
        for name, layer in params.items()
    })  # fmt: skip
