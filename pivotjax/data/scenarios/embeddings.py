"""Columns of embeddings: an image as the frozen vision encoder sees it, a caption as the frozen LLM does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pivotjax.data.devices import replicated, shared_out
from pivotjax.data.scenarios.clustering import ClusteringConfig
from pivotjax.data.scenarios.columns import Column, Rows, Simple
from pivotjax.models import vision
from pivotjax.models.language import Language, load_language


def column(config: ClusteringConfig, weights: Callable[[str], Path]) -> Column:
    """The column "embedding" of a config, float16 [samples, D]; `weights` finds a model's files by its name."""
    if config.of == "image":
        return _images(vision.load_encoder(weights(config.vision)))
    language = load_language(weights(config.language))
    return _captions(language, config.caption_states, config.caption_tokens)


def _images(encoder: vision.Encoder) -> Column:
    params = replicated(encoder.params)

    def of(rows: Rows) -> np.ndarray:
        tokens = vision.encode(encoder._replace(params=params), shared_out(rows.pictures))
        return np.asarray(jnp.mean(tokens, axis=1)).astype(np.float16)

    return Simple("embedding", of, f"image {encoder.identity}", encoder.image_size)


def _captions(language: Language, states: str, length: int) -> Column:
    params = replicated(language.params)

    def of(rows: Rows) -> np.ndarray:
        tokens = np.zeros((len(rows.captions), length), np.int32)
        real = np.zeros((len(rows.captions), length), bool)
        for row, found in enumerate(language.tokenizer.encode_batch(rows.captions, add_special_tokens=False)):
            ids = found.ids[:length] or [language.eos_id]
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
        pooled = _pooled(language.graphdef, states, params, shared_out(tokens), shared_out(real))
        return np.asarray(pooled).astype(np.float16)

    return Simple("embedding", of, f"caption {language.identity} {states} {length}")


@partial(jax.jit, static_argnums=(0, 1))
def _pooled(graphdef, states: str, params, tokens: Int[Array, "B L"], real: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Mean over a caption's tokens. The LLM is causal and padding stands on the right: nothing real sees it."""
    language = nnx.merge(graphdef, params)
    x = language.embed(tokens)
    if states == "hidden":
        x, _ = language(x, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None)
    weights = real[..., None].astype(jnp.float32)
    return jnp.sum(x * weights, axis=1) / jnp.sum(weights, axis=1)
