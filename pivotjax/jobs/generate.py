"""`pivotjax generate IMAGE [PROMPT] --model CHECKPOINT`: captions any picture, or answers a question about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath

from pivotjax import config as configs
from pivotjax.checkpoints import hub
from pivotjax.data import assets, images
from pivotjax.errors import InputError
from pivotjax.jobs import assemble
from pivotjax.models import generation, projector
from pivotjax.models.multimodal import is_model, load_model
from pivotjax.models.vision import encode
from pivotjax.models.vlm import IMAGE_TOKEN


@dataclass(frozen=True)
class GenerateConfig:
    """Captions a picture with a projector and the frozen models that it was trained between, or asks a whole model."""

    image: tyro.conf.Positional[Path]
    """Picture: PNG, JPEG, WebP, GIF, BMP or SVG."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text after the image (default: the one that the projector was trained with), or the question to a whole model."""
    images: Annotated[tuple[Path, ...], tyro.conf.arg(name="image"), tyro.conf.UseAppendAction] = ()
    """One more picture, for a whole model; may be given several times."""
    model: str = tyro.MISSING
    """A projector (an Orbax folder or a .safetensors file written by pivotjax), or a whole model: any folder that
    `pivotjax convert` reads, or hf://OWNER/NAME."""
    template: str | None = None
    """Conversation format of a whole model: plain, vicuna_v1, llama_2, mistral_instruct, chatml (default: its own)."""
    vision: str | None = None
    """Folder of the vision tower, where a checkpoint of the LLaVA repository does not have it inside."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of a whole model's weights and arithmetic."""
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
    """The caption of one picture, or the answer to a question about some."""
    path = hub.located(str(config.model))
    return _ask(config, path) if is_model(path) else _caption(config, path)


def _ask(config: GenerateConfig, path: Path | epath.Path) -> str:
    """A whole model's answer."""
    pictures = [images.read_image(path) for path in (config.image, *config.images)]
    model = load_model(path, jnp.dtype(config.dtype), vision=config.vision)
    inputs = model.prepare(pictures, config.prompt or "", config.template)
    key = jax.random.key(config.seed)
    written = model.generate(
        **inputs, max_new=config.max_new, temperature=config.temperature, top_p=config.top_p, key=key
    )
    return model.decode(written)[0]


def _caption(config: GenerateConfig, path: Path) -> str:
    """A projector's caption of one picture."""
    if config.images or config.template or config.vision:
        raise InputError(f"{config.model} is a projector alone: it takes one picture, and no --template or --vision")
    images.open_image(config.image)  # one that cannot be read is refused before anything is loaded
    params, info = assemble.load_projector(path)
    frozen = assemble.frozen_of(info, assets.cache_folder(config.cache), str(path))
    features = encode(frozen.encoder, frozen.picture(config.image)[None])
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
    captioner, head = frozen.captioner, frozen.captioner.head
    if prompt is not None:
        ids = language.tokenizer.encode(prompt, add_special_tokens=False).ids
        head = np.array([*captioner.begin_ids, *[IMAGE_TOKEN] * captioner.num_visual, *ids], np.int32)
    if len(head) + max_new > language.config.max_length:
        raise InputError(
            f"prompt and caption exceed the LLM's {language.config.max_length} tokens; shorten the prompt or --max-new"
        )
    tokens = jnp.tile(jnp.array(head), (len(features), 1))
    visual = projector.apply(params, jnp.asarray(features))
    written = generation.generate(
        language, language.params, visual, tokens, max_new=max_new, temperature=temperature, top_p=top_p, key=key
    )
    texts = [language.tokenizer.decode([int(t) for t in new if t != language.eos_id]) for new in np.asarray(written)]
    return [captioner.own(text) for text in texts]
