"""Text generation with a key-value cache: greedy, or sampled with a temperature and nucleus (top-p) truncation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

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
    max_new: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> Int[Array, "B max_new"]:
    """Continues each row of `tokens` by `max_new` tokens; int32, end-of-sequence from where a row has ended.

    Args:
      language: supplies the network, its config and the end-of-sequence token.
      params: the network's parameters (usually `language.params`, or a copy placed on devices).
      visual: visual tokens in the language model's input space; the i-th stands where a row's i-th IMAGE_TOKEN stands.
      tokens: prompts, padded on the right.
      temperature: 0 picks the most likely token; above it, logits are divided by it and a token is drawn with `key`.
      top_p: draws from the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020).
      lengths: real tokens of each row; all P where it is None.

    Compiled once for each batch size and bucket of 32 tokens of prompt and of answer. InputError for a bad option, or
    where prompt and answer do not fit the model's context.
    """
    batch, prompt = tokens.shape
    lengths = np.full(batch, prompt, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    _check(language, visual, np.asarray(tokens), lengths, max_new, temperature, top_p, key)
    padded = np.full((batch, _bucket(prompt)), language.eos_id, np.int32)
    padded[:, :prompt] = tokens
    answer = _generate(
        language.graphdef, _bucket(max_new), temperature > 0, params, visual, padded, lengths, language.eos_id, max_new,
        jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0) if key is None else key,
    )  # fmt: skip
    return answer[:, :max_new]


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _check(language, visual, tokens, lengths, max_new, temperature, top_p, key) -> None:
    batch, prompt = tokens.shape
    if not prompt or len(lengths) != batch or lengths.min() < 1 or lengths.max() > prompt:
        raise InputError(f"each of the {batch} prompts needs 1 to {prompt} tokens; got lengths {lengths.tolist()}")
    if max_new < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"cannot generate with max_new={max_new}, temperature={temperature}, top_p={top_p}; "
            "use max_new >= 1, temperature >= 0 and 0 < top_p <= 1"
        )
    if temperature > 0 and key is None:
        raise InputError("sampling (temperature above 0) needs a random key; give one, or use temperature 0")
    longest, room = int(lengths.max()) + max_new, language.config.max_length
    if longest > room:
        raise InputError(f"prompt and answer take {longest} tokens and {language.name} reads {room}; shorten one")
    images, given = (tokens == IMAGE_TOKEN).sum(-1), 0 if visual is None else visual.shape[1]
    if (images != given).any():
        raise InputError(f"the prompts hold {images.tolist()} image tokens for {given} visual tokens; they must agree")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, room, sample, params, visual, tokens, lengths, eos_id, max_new, temperature, top_p, key):
    """Fills `[B, room]`; slots of the cache: the padded prompt, then one for each new token."""
    module = nnx.merge(graphdef, params)
    batch, prompt = tokens.shape
    slots, rows = jnp.arange(prompt + room), jnp.arange(batch)

    def choose(hidden, step, ended):
        logits = module.logits(hidden)
        token = _sample(logits, temperature, top_p, jax.random.fold_in(key, step)) if sample else jnp.argmax(logits, -1)
        token = jnp.where(ended, eos_id, token).astype(jnp.int32)
        return token, ended | (token == eos_id)

    # The prompt in one pass. A row's padding lies after its last token, where no real token looks.
    x = module.embed(tokens) if visual is None else splice(module, tokens, visual)
    cache = Cache.empty(module.config, batch, prompt + room, x.dtype)
    causal = jnp.broadcast_to(slots <= jnp.arange(prompt)[:, None], (batch, prompt, prompt + room))
    hidden, cache = module(x, jnp.broadcast_to(jnp.arange(prompt), tokens.shape), causal, cache)
    token, ended = choose(hidden[rows, lengths - 1], 0, jnp.zeros(batch, bool))
    answer = jnp.full((batch, room), eos_id, jnp.int32).at[:, 0].set(token)

    def more(state):
        step, _, ended, _, _ = state
        return (step < max_new) & ~ended.all()

    def extend(state):
        step, token, ended, answer, cache = state
        last = prompt + step - 1  # the slot of the token chosen before
        seen = (slots < lengths[:, None]) | ((slots >= prompt) & (slots <= last))
        hidden, cache = module(module.embed(token)[:, None], (lengths + step - 1)[:, None], seen[:, None], cache, last)
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
