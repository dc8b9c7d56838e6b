"""`pivotjax generate IMAGE [PROMPT] --model CHECKPOINT`: captions any picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pivotjax import config as configs
from pivotjax.data import assets, images
from pivotjax.errors import InputError
from pivotjax.jobs import assemble
from pivotjax.models import generation, projector
from pivotjax.models.vision import encode
from pivotjax.models.vlm import IMAGE_TOKEN


@dataclass(frozen=True)
class GenerateConfig:
    """Captions a picture with a projector and the frozen models that it was trained between."""

    image: tyro.conf.Positional[Path]
    """Picture: PNG, JPEG, WebP, GIF, BMP or SVG."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text after the image (default: the one that the projector was trained with)."""
    model: Path = tyro.MISSING
    """Projector checkpoint: an Orbax folder or a .safetensors file written by pivotjax."""
    max_new: int = 24
    """Most tokens to write."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the drawing."""
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""


def main(args: Sequence[str]) -> None:
    """Command line: prints the caption."""
    config = configs.overridden(GenerateConfig(tyro.MISSING), args, "pivotjax generate")
    print(run(config))


def run(config: GenerateConfig) -> str:
    """The caption of one picture."""
    image = images.open_image(config.image)
    params, info = assemble.load_projector(config.model)
    frozen = assemble.frozen_of(info, assets.cache_folder(config.cache), str(config.model))
    features = encode(frozen.encoder, image[None])
    key = jax.random.key(config.seed)
    return captions(frozen, params, features, config.prompt, config.max_new, config.temperature, config.top_p, key)[0]


def captions(
    frozen: assemble.Frozen,
    params: projector.Params,
    features: jax.Array | np.ndarray,
    prompt: str | None = None,
    max_new: int = 24,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> list[str]:
    """Captions of N images given their frozen features `[N, V, d_in]`."""
    language = frozen.language
    text = frozen.captioner.prompt if prompt is None else prompt
    ids = language.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) + frozen.encoder.num_tokens + max_new > language.config.max_length:
        raise InputError(
            f"prompt and caption exceed the LLM's {language.config.max_length} tokens; shorten the prompt or --max-new"
        )
    row = [IMAGE_TOKEN] * frozen.encoder.num_tokens + ids
    tokens = jnp.tile(jnp.array(row, jnp.int32), (len(features), 1))
    visual = projector.apply(params, jnp.asarray(features))
    written = generation.generate(
        language, language.params, visual, tokens, max_new=max_new, temperature=temperature, top_p=top_p, key=key
    )
    return [
        language.tokenizer.decode([int(t) for t in new if t != language.eos_id]).strip() for new in np.asarray(written)
    ]
