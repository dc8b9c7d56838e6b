"""Vision and language together: visual tokens spliced into the text, and the caption loss at caption positions only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pivotjax.models.language.decoder import PLAIN, Plan

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


def caption_hidden(
    language,
    tokens: Int[Array, "B L"],
    visual: Float[Array, "B V D"],
    places: Int[Array, "B T"],
    segments: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    plan: Plan = PLAIN,
) -> Float[Array, "B T D"]:
    """The decoder's last hidden states at `places` of each row.

    With `segments` a token sees the earlier tokens of its own segment alone, and `positions` count from each segment's
    beginning; without, a row is one sample with its padding on the right, so that nothing a caption token sees is
    padding. `plan.attention` must keep segments apart by itself.
    """
    x = plan.place(splice(language, tokens, visual))
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    mask = None if segments is None or plan.attention else _mask(segments)
    hidden, _ = language(x, positions, mask, plan=plan)
    return jnp.take_along_axis(hidden, places[..., None], axis=1)


def _mask(segments: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Which keys each query sees: the earlier ones, and itself, of its segment."""
    length = segments.shape[-1]
    return jnp.tri(length, dtype=bool) & (segments[:, :, None] == segments[:, None, :])


def caption_logits(
    language, tokens: Int[Array, "B L"], visual: Float[Array, "B V D"], length: int, first_position: int
) -> Float[Array, "B T vocab"]:
    """Logits of the `length` (T) caption tokens, predicted from sequence position `first_position` on."""
    places = jnp.broadcast_to(first_position + jnp.arange(length), (len(tokens), length))
    return language.logits(caption_hidden(language, tokens, visual, places))
