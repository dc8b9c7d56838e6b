"""Generation against the definition: the whole sequence through the network again for every new token, no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pivotjax.errors import InputError
from pivotjax.models.generation import _sample, generate, generate_from
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


def padded_left(rows, filler=7):
    """Tokens and mask of rows that end together."""
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(row, (longest - len(row), 0), constant_values=filler) for row in rows])
    return tokens, np.arange(longest) >= longest - np.array([len(row) for row in rows])[:, None]


def test_several_images_a_row_padded_on_the_left(language):
    """Two images of V tokens each, at places of their own in every row."""
    random = np.random.default_rng(4)
    visual = jnp.asarray(random.normal(size=(3, 2 * V, CONFIG.dim)), jnp.float32)
    image, rows = np.full(V, IMAGE_TOKEN), []
    for before, between, after in ((0, 2, 3), (1, 0, 1), (2, 5, 1)):
        words = [random.integers(6, CONFIG.vocab_size, n) for n in (before, between, after)]
        rows.append(np.concatenate([words[0], image, words[1], image, words[2]]))
    expected = greedy_without_cache(language, visual, rows, 12)
    tokens, mask = padded_left(rows)

    def answers(visual):
        return np.asarray(generate(language, language.params, visual, tokens, max_new=12, attention_mask=mask)).tolist()

    assert answers(visual) == expected
    assert answers(jnp.concatenate([visual[:, V:], visual[:, :V]], axis=1)) != expected


def test_embedded_prompts_give_what_tokens_give(language):
    tokens, visual = prompts([6, 6]), visual_tokens(2)
    module = nnx.merge(language.graphdef, language.params)
    prompt, mask = splice(module, tokens, visual), np.ones((2, 6), int)
    options = dict(max_new=9, temperature=0.9, top_p=0.8, key=jax.random.key(3))
    stop = (language.eos_id, 11)
    expected = generate(language, language.params, visual, tokens, stop=stop, **options)
    got = generate_from(language.graphdef, language.params, prompt, mask, stop=stop, pad_id=language.eos_id, **options)
    assert (np.asarray(got) == np.asarray(expected)).all()


def test_each_of_several_stop_tokens_ends_a_row(language):
    rows = [prompts([n], 0, seed=n)[0] for n in (4, 9, 6)]
    tokens, mask = padded_left(rows)
    prompt = nnx.merge(language.graphdef, language.params).embed(tokens)

    def answers(stop):
        options = dict(stop=stop, pad_id=36, max_new=12)
        return np.asarray(generate_from(language.graphdef, language.params, prompt, mask, **options)).tolist()

    free = answers(())
    stop = (free[0][2], free[1][7])
    expected = []
    for row in free:
        end = min([i for i, token in enumerate(row) if token in stop], default=11)
        expected.append(row[: end + 1] + [36] * (11 - end))
    assert answers(stop) == answers(stop[::-1]) == expected != free


def test_sampling_does_not_depend_on_the_side_of_the_padding(language):
    rows = [prompts([n], 0, seed=n)[0] for n in (4, 9, 6)]
    right = np.stack([np.pad(row, (0, 9 - len(row)), constant_values=8) for row in rows])
    left, mask = padded_left(rows)
    options = dict(max_new=12, temperature=1.0, top_p=0.9, key=jax.random.key(1), stop=())
    expected = generate(language, language.params, None, right, lengths=[4, 9, 6], **options)
    assert (generate(language, language.params, None, left, attention_mask=mask, **options) == expected).all()


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
    for length, new, real in ((6, 5, 6), (9, 7, 8), (12, 30, 4)):
        mask = np.arange(length) >= length - real  # on either side
        mask = np.stack([mask, mask, mask[::-1], mask[::-1], mask])
        tokens = np.where(mask, prompts([length] * 5), 7)
        tokens[mask] = prompts([real] * 5).ravel()
        generate(language, language.params, visual_tokens(5), tokens, max_new=new, attention_mask=mask)
    assert _generate._cache_size() == before + 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new": 0}, "max_new"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.5}, "key"),
        ({"max_new": 127}, "reads 128"),
        ({"lengths": [7, 1]}, "lengths"),
        ({"lengths": [0, 1]}, "lengths"),
        ({"lengths": [6, 6], "attention_mask": np.ones((2, 6))}, "either"),
        ({"attention_mask": np.ones((2, 5))}, r"shape \[2, 6\]"),
        ({"attention_mask": np.zeros((2, 6)), "visual": None}, "one token or more"),
        ({"visual": visual_tokens(2)[:, :1]}, "image tokens"),
        ({"visual": None}, "image tokens"),
    ],
)
def test_bad_options_are_one_clear_line(language, options, words):
    visual = options.pop("visual", visual_tokens(2))
    with pytest.raises(InputError, match=words) as error:
        generate(language, language.params, visual, prompts([6, 6]), **options)
    assert "\n" not in str(error.value)
