"""Text generation with a key-value cache: greedy, or sampled with a temperature and nucleus (top-p) truncation."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pivotjax.errors import InputError
from pivotjax.models.language import Cache, Language
from pivotjax.models.vlm import IMAGE_TOKEN, splice

_BUCKET = 32  # prompts and answers are compiled for multiples of this many tokens


def generate(
    language: Language,
    params: dict,
    visual: Float[Array, "B V D"] | None,
    tokens: Int[Array, "B P"],
    *,
    lengths: Int[Array, " B"] | None = None,
    attention_mask: Bool[Array, "B P"] | None = None,
    stop: Sequence[int] | None = None,
    **options,
) -> Int[Array, "B max_new"]:
    """Continues each row of `tokens` by `max_new` tokens; int32, end-of-sequence from where a row has ended.

    Args:
      language: supplies the network, its config and the end-of-sequence token.
      params: the network's parameters (usually `language.params`, or a copy placed on devices).
      visual: visual tokens in the language model's input space, those of a row's images one after the other; the i-th
        stands where a row's i-th IMAGE_TOKEN stands.
      tokens: prompts, padded to one length with anything.
      lengths: real tokens of each row, where prompts are padded on the right.
      attention_mask: which tokens are real, where they are padded elsewhere. Neither: all.
      stop: tokens that end a row; the end-of-sequence token where it is None.
      options: of `generate_from`: max_new, temperature, top_p, key.

    Compiled once for each batch size and bucket of 32 tokens of prompt and of answer. InputError for a bad option, or
    where prompt and answer do not fit the model's context.
    """
    tokens = np.asarray(tokens)
    real = _real(tokens.shape, lengths, attention_mask)
    images, given = ((tokens == IMAGE_TOKEN) & real).sum(-1), 0 if visual is None else visual.shape[1]
    if (images != given).any():
        raise InputError(f"the prompts hold {images.tolist()} image tokens for {given} visual tokens; they must agree")
    padded = np.full((len(tokens), _bucket(tokens.shape[1])), language.eos_id, np.int32)
    padded[:, : tokens.shape[1]] = np.where(real, tokens, language.eos_id)
    prompt = _embedded(language.graphdef, params, visual, padded)
    mask = np.pad(real, ((0, 0), (0, padded.shape[1] - tokens.shape[1])))
    stop = (language.eos_id,) if stop is None else stop
    return generate_from(language.graphdef, params, prompt, mask, stop=stop, pad_id=language.eos_id, **options)


def generate_from(
    graphdef: nnx.GraphDef,
    params: dict,
    prompt: Float[Array, "B P D"],
    attention_mask: Bool[Array, "B P"],
    *,
    stop: Sequence[int],
    pad_id: int,
    max_new: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "B max_new"]:
    """Continues prompts that are embedded already (text and images spliced) by `max_new` tokens each; int32.

    Args:
      graphdef, params: a `Decoder`.
      prompt: input embeddings, padded on either side.
      attention_mask: true (or 1) at real tokens; a row's first real token has position 0.
      stop: tokens that end a row; the token itself is written.
      pad_id: written from where a row has ended.
      temperature: 0 picks the most likely token; above it, logits are divided by it and a token is drawn with `key`.
      top_p: draws from the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020).

    Compiled once for each batch size and bucket of 32 tokens of prompt and of answer. InputError for a bad option, or
    where prompt and answer do not fit the model's context.
    """
    real = np.asarray(attention_mask, bool)
    config = nnx.merge(graphdef, params).config
    _check(config.max_length, real, prompt, max_new, temperature, top_p, key)
    stop_ids, key = jnp.asarray(stop, jnp.int32), jax.random.key(0) if key is None else key
    more = ((0, 0), (0, _bucket(real.shape[1]) - real.shape[1]))
    padded, padded_real = jnp.pad(prompt, (*more, (0, 0))) if more[1][1] else prompt, np.pad(real, more)
    first = _before_switch(config.rope, int(real.sum(-1).max()), max_new)
    answer = _generate(
        graphdef, _bucket(first), temperature > 0, params, padded, padded_real, stop_ids, np.int32(pad_id), first,
        np.float32(temperature), np.float32(top_p), key,
    )[:, :first]  # fmt: skip
    if first == max_new:
        return answer
    # From the next token on, every position turns by other frequencies: what is cached is void, so all is read again.
    rest = generate_from(
        graphdef, params,
        jnp.concatenate([prompt, _embedded(graphdef, params, None, answer)], axis=1),
        np.pad(real, ((0, 0), (0, first)), constant_values=True),
        stop=stop, pad_id=pad_id, max_new=max_new - first, temperature=temperature, top_p=top_p,
        key=jax.random.fold_in(key, max_new),
    )  # fmt: skip
    ended = jnp.isin(answer, stop_ids).any(-1, keepdims=True)
    return jnp.concatenate([answer, jnp.where(ended, pad_id, rest)], axis=1)


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _before_switch(rope, longest: int, max_new: int) -> int:
    """How many of the new tokens follow a text that turns by the same frequencies as the prompt does."""
    if not rope.long_divisors or longest > rope.trained_length:
        return max_new
    return min(max_new, rope.trained_length - longest + 1)


def _real(shape: tuple[int, int], lengths, attention_mask) -> np.ndarray:
    batch, prompt = shape
    if attention_mask is not None:
        if lengths is not None or np.shape(attention_mask) != shape:
            raise InputError(f"give either lengths or an attention_mask of shape {list(shape)}, as the tokens have")
        return np.asarray(attention_mask, bool)
    if lengths is None:
        return np.ones(shape, bool)
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > prompt:
        raise InputError(f"each of the {batch} prompts needs 1 to {prompt} tokens; got lengths {lengths.tolist()}")
    return np.arange(prompt) < lengths[:, None]


def _check(room: int, real: np.ndarray, prompt, max_new, temperature, top_p, key) -> None:
    if real.shape != prompt.shape[:2] or not real.any(-1).all():
        raise InputError(
            f"the attention_mask {list(real.shape)} must mark one token or more of each prompt {list(prompt.shape[:2])}"
        )
    if max_new < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"cannot generate with max_new={max_new}, temperature={temperature}, top_p={top_p}; "
            "use max_new >= 1, temperature >= 0 and 0 < top_p <= 1"
        )
    if temperature > 0 and key is None:
        raise InputError("sampling (temperature above 0) needs a random key; give one, or use temperature 0")
    longest = int(real.sum(-1).max()) + max_new
    if longest > room:
        raise InputError(f"prompt and answer take {longest} tokens and the model reads {room}; shorten one")


@partial(jax.jit, static_argnums=0)
def _embedded(graphdef, params, visual, tokens) -> Float[Array, "B P D"]:
    module = nnx.merge(graphdef, params)
    return module.embed(tokens) if visual is None else splice(module, tokens, visual)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, room, sample, params, prompt, real, stop, pad_id, max_new, temperature, top_p, key):
    """Fills `[B, room]`; slots of the cache: the padded prompt, then one for each new token."""
    module = nnx.merge(graphdef, params)
    batch, length = real.shape
    slots, rows = jnp.arange(length + room), jnp.arange(batch)
    count, last_real = real.sum(-1), length - 1 - jnp.argmax(real[:, ::-1], axis=-1)
    readable = jnp.pad(real, ((0, 0), (0, room)))

    def choose(hidden, step, ended):
        logits = module.logits(hidden)
        token = _sample(logits, temperature, top_p, jax.random.fold_in(key, step)) if sample else jnp.argmax(logits, -1)
        token = jnp.where(ended, pad_id, token).astype(jnp.int32)
        return token, ended | jnp.isin(token, stop)

    # The prompt in one pass. What padding becomes does not matter: no real token sees it.
    cache = Cache.empty(module.config, batch, length + room, prompt.dtype)
    positions = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
    causal = readable[:, None] & (slots <= jnp.arange(length)[:, None])
    hidden, cache = module(prompt, positions, causal, cache)
    token, ended = choose(hidden[rows, last_real], 0, jnp.zeros(batch, bool))
    answer = jnp.full((batch, room), pad_id, jnp.int32).at[:, 0].set(token)

    def more(state):
        step, _, ended, _, _ = state
        return (step < max_new) & ~ended.all()

    def extend(state):
        step, token, ended, answer, cache = state
        last = length + step - 1  # the slot of the token chosen before
        seen = readable | ((slots >= length) & (slots <= last))
        hidden, cache = module(module.embed(token)[:, None], (count + step - 1)[:, None], seen[:, None], cache, last)
        token, ended = choose(hidden[:, 0], step, ended)
        return step + 1, token, ended, answer.at[:, step].set(token), cache

    return jax.lax.while_loop(more, extend, (1, token, ended, answer, cache))[3]


def _sample(logits: Float[Array, "B vocab"], temperature, top_p, key) -> Int[Array, " B"]:
    """Draws from `softmax(logits / temperature)` within its nucleus: a token stays if those before it hold < top_p."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability, axis=-1) - probability
    rank = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
