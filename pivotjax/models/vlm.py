"""Vision and language together: visual tokens spliced into the text, and the caption loss at caption positions only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMAGE_TOKEN = -200  # LLaVA's placeholder; stands once for every visual token


def splice(language, tokens: Int[Array, "B L"], visual: Float[Array, "B V D"]) -> Float[Array, "B L D"]:
    """Embeds `tokens` with `language.embed` with the i-th visual token where a row's i-th IMAGE_TOKEN stands."""
    is_image = tokens == IMAGE_TOKEN
    text = language.embed(jnp.where(is_image, 0, tokens))
    place = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, visual.shape[1] - 1)
    spliced = jnp.take_along_axis(visual, place[..., None], axis=1).astype(text.dtype)
    return jnp.where(is_image[..., None], spliced, text)


def token_nll(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target], without keeping a second array of the logits' size."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Entropy of softmax(logits), in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)


def caption_logits(
    language,
    tokens: Int[Array, "B L"],
    visual: Float[Array, "B V D"],
    length: int,
    first_position: int,
    remat: bool = False,
) -> Float[Array, "B T vocab"]:
    """Logits of the `length` (T) caption tokens, which stand from sequence position `first_position` on.

    No logits are computed anywhere else. Attention is causal and padding stands on the right, so nothing a caption
    token sees is padding.
    """
    x = splice(language, tokens, visual)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = language(x, positions, None, remat=remat)
    return language.logits(hidden[:, first_position : first_position + length])


def caption_nll(
    language,
    tokens: Int[Array, "B L"],
    visual: Float[Array, "B V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    first_position: int,
    remat: bool = False,
) -> Float[Array, " B"]:
    """Sum over a caption's tokens of their negative log-likelihood, in nats, one number a sample.

    Target t is read at sequence position `first_position + t`; `weights` is 1 at real caption tokens (end of sequence
    included) and 0 at padding.
    """
    logits = caption_logits(language, tokens, visual, targets.shape[1], first_position, remat)
    return jnp.sum(weights * token_nll(logits, targets), axis=-1)
