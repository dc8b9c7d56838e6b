"""Generation against the definition: the whole sequence through the network again for every new token, no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pivotjax.errors import InputError
from pivotjax.models.generation import _sample, generate
from pivotjax.models.language import FAMILIES, DecoderConfig, Language, abstract
from pivotjax.models.vlm import IMAGE_TOKEN, splice

CONFIG = DecoderConfig(
    vocab_size=37, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=40,
    tie_embeddings=True, max_length=128,
)  # fmt: skip
V = 3


@pytest.fixture(scope="module")
def language():
    graphdef, shapes = abstract(FAMILIES["llama"], CONFIG, jnp.float32)
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * random.normal(size=leaf.shape), leaf.dtype), shapes)
    return Language("tiny", CONFIG, graphdef, params, None, 5, "")


def visual_tokens(batch):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, V, CONFIG.dim)), jnp.float32)


def prompts(lengths, images=V, seed=0):
    tokens = np.random.default_rng(seed).integers(6, CONFIG.vocab_size, (len(lengths), max(lengths)))
    tokens[:, :images] = IMAGE_TOKEN
    return tokens


def greedy_without_cache(language, visual, rows, max_new):
    """One row at a time, the whole sequence again for each token; causality hides the padding to one shape."""

    @jax.jit
    def logits(sequence, visual):
        module = nnx.merge(language.graphdef, language.params)
        x = module.embed(sequence[None]) if visual is None else splice(module, sequence[None], visual[None])
        return module.logits(module(x, jnp.arange(len(sequence))[None], None)[0][0])

    answers = []
    for row, prompt in enumerate(rows):
        sequence, start = np.zeros(32, int), len(prompt)
        sequence[:start] = prompt
        for n in range(start, start + max_new):
            ended = n > start and sequence[n - 1] == language.eos_id
            now = logits(sequence, None if visual is None else visual[row])
            sequence[n] = language.eos_id if ended else int(now[n - 1].argmax())
        answers.append(sequence[start : start + max_new].tolist())
    return answers


@pytest.mark.parametrize("with_image", [True, False])
def test_cache_gives_the_tokens_of_the_definition(language, with_image):
    lengths = [4, 9, 6, 1 + V]
    tokens = prompts(lengths, V if with_image else 0)
    visual = visual_tokens(4) if with_image else None
    rows = [tokens[i, :n] for i, n in enumerate(lengths)]
    expected = greedy_without_cache(language, visual, rows, 12)
    assert len({tuple(answer) for answer in expected}) > 1 and any(language.eos_id not in answer for answer in expected)
    tokens[np.arange(9) >= np.array(lengths)[:, None]] = 7  # padding of any kind is not seen
    answer = generate(language, language.params, visual, tokens, max_new=12, lengths=lengths)
    assert answer.dtype == jnp.int32 and np.asarray(answer).tolist() == expected


def test_a_row_that_ended_is_filled_with_end_of_sequence(language):
    arguments = language.params, visual_tokens(2), prompts([6, 6])
    free = np.asarray(generate(language, *arguments, max_new=8))[0].tolist()
    stopped = np.asarray(generate(language._replace(eos_id=free[2]), *arguments, max_new=8))[0].tolist()
    first = free.index(free[2])
    assert free != stopped == free[: first + 1] + [free[2]] * (7 - first)


def test_sampling_depends_on_the_key_alone_and_nearly_zero_temperature_is_greedy(language):
    tokens, visual = prompts([6, 6, 6]), visual_tokens(3)

    def sample(seed, **options):
        key = jax.random.key(seed)
        return np.asarray(generate(language, language.params, visual, tokens, max_new=10, key=key, **options))

    assert (sample(0, temperature=1.0) == sample(0, temperature=1.0)).all()
    assert (sample(0, temperature=1.0) != sample(1, temperature=1.0)).any()
    greedy = np.asarray(generate(language, language.params, visual, tokens, max_new=10))
    assert (sample(0, temperature=1e-4) == greedy).all()
    assert (sample(0, temperature=1.0, top_p=1e-6) == greedy).all()


def test_nucleus_holds_the_right_tokens_at_the_right_frequencies():
    probability = np.array([0.15, 0.5, 0.05, 0.3])
    logits = jnp.broadcast_to(2 * jnp.log(probability), (20000, 4))  # temperature 2 gives the probabilities back
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.9, [0, 1, 3]), (0.79, [1, 3]), (0.5, [1])):
        drawn = np.asarray(_sample(logits, 2.0, top_p, jax.random.key(0)))
        expected = np.where(np.isin(np.arange(4), kept), probability, 0)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected / expected.sum(), atol=0.015)


def test_one_compilation_for_a_bucket(language):
    from pivotjax.models.generation import _generate

    before = _generate._cache_size()
    for length, new in ((6, 5), (9, 7), (12, 30)):
        generate(language, language.params, visual_tokens(5), prompts([length] * 5), max_new=new)
    assert _generate._cache_size() == before + 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new": 0}, "max_new"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.5}, "key"),
        ({"max_new": 127}, "reads 128"),
        ({"lengths": [7, 1]}, "lengths"),
        ({"visual": visual_tokens(2)[:, :1]}, "image tokens"),
        ({"visual": None}, "image tokens"),
    ],
)
def test_bad_options_are_one_clear_line(language, options, words):
    visual = options.pop("visual", visual_tokens(2))
    with pytest.raises(InputError, match=words) as error:
        generate(language, language.params, visual, prompts([6, 6]), **options)
    assert "\n" not in str(error.value)
