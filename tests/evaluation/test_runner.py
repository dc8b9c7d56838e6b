"""Packed scoring against every candidate scored alone; control, duplicates, diverged projectors, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from pivotjax.data.captions import Captioner
from pivotjax.errors import InputError
from pivotjax.evaluation import runner, tasks
from pivotjax.evaluation.metrics import summarise
from pivotjax.evaluation.tasks import Question, TestSet
from pivotjax.models import projector, vlm
from pivotjax.models.language import Decoder, DecoderConfig, Language
from pivotjax.training import losses

VISUAL, CHANNELS = 4, 6
COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "square", "triangle")
WORDS = ("a", "big", "cat", "dog", "in", "the", "house", "on", "fire", *COLOURS, *SHAPES)


@pytest.fixture(scope="module")
def language() -> Language:
    config = DecoderConfig(64, 32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1]))()
    params["embedding"] = 30.0 * params["embedding"]  # so that text counts beside the image
    vocabulary = {"<unk>": 0, "<end>": 1, "\n": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return Language("tiny", config, graphdef, params, tokenizer, 1, "none")


@pytest.fixture(scope="module")
def captioner(language) -> Captioner:
    return Captioner(language.tokenizer, language.eos_id, prompt="\n", num_visual=VISUAL, max_caption=8)


@pytest.fixture(scope="module")
def projectors() -> projector.Params:
    keys = jax.random.split(jax.random.key(1), 3)
    return projector.stack([projector.init("mlp2x_gelu", CHANNELS, 32, key, 0.3) for key in keys])


@pytest.fixture(scope="module")
def tests() -> dict[str, TestSet]:
    generator = np.random.default_rng(2)

    def features(items):
        return generator.normal(size=(items, VISUAL, CHANNELS)).astype(np.float32)

    free = [" ".join(generator.choice(WORDS, generator.integers(1, 7))) for _ in range(13)]
    shapes = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
    seen = tuple(shapes[i] for i in (0, 4, 4, 2, 8, 0, 1))
    return {
        "free": TestSet(features(13), tuple(free), tuple(f"free-{i}" for i in range(13))),
        "shapes": TestSet(features(7), seen, tuple(f"shape-{i}" for i in range(7)), shapes),
    }


def _alone(language, params, features, prompt, caption) -> float:
    """Log-likelihood of one caption: a plain causal pass over its sequence, padded on the right to one length."""
    sequence = np.array([*prompt, *caption, *[0] * (12 - len(caption))])
    logp = _all_logp(language.graphdef, language.params, params, features, sequence)
    first = len(features) + len(prompt)
    return float(sum(np.float64(logp[first - 1 + t, token]) for t, token in enumerate(caption)))


@functools.partial(jax.jit, static_argnums=0)
def _all_logp(graphdef, language_params, params, features, sequence):
    model = nnx.merge(graphdef, language_params)
    x = jnp.concatenate([projector.apply(params, features), model.embed(sequence)])[None]
    hidden, _ = model(x, jnp.arange(x.shape[1])[None], None)
    return jax.nn.log_softmax(model.logits(hidden[0]))


def _one(projectors, p):
    return jax.tree.map(lambda leaf: leaf[p], projectors)


def test_packed_scores_equal_each_candidate_alone(language, captioner, projectors, tests):
    """Loss within 1e-4 nats and the same winner as scoring every candidate by itself, without packing or sharing."""
    outcomes = runner.evaluate(language, language.params, projectors, tests, captioner, choices=5, control_items=6)
    for domain, test in tests.items():
        outcome = outcomes[domain]
        for p in range(3):
            for item, question in enumerate(tasks.retrieval(domain, test, captioner, 5)):
                scores = [
                    _alone(language, _one(projectors, p), test.features[item], captioner.prompt_ids, caption)
                    for caption in question.captions
                ]
                assert outcome.nll[p, item] == pytest.approx(-scores[0], abs=1e-4)
                assert outcome.correct[p, item] == (scores[0] > max(scores[1:]))
                assert outcome.tokens[item] == len(captioner.caption_ids(test.captions[item]))
            for item, question in enumerate(tasks.shuffled(test, captioner, 6)):
                other = test.features[question.image]
                assert test.captions[question.image] != test.captions[item]
                alone = _alone(language, _one(projectors, p), other, captioner.prompt_ids, question.captions[0])
                assert outcome.control_nll[p, item] == pytest.approx(-alone, abs=1e-4)
    assert outcomes["free"].choices == 5 and outcomes["shapes"].choices == 9
    assert outcomes["free"].correct.any() and not outcomes["free"].correct.all()


def test_caption_losses_equal_the_training_loss(language, captioner, projectors, tests):
    """The fast path is the loss a token that training computes from padded sequences, within 1e-5."""
    test = tests["free"]
    encoded = [np.stack(part) for part in zip(*map(captioner.encode, test.captions))]
    got = runner.caption_losses(language, language.params, projectors, test.features, *encoded)
    tokens, targets, weights = encoded

    @jax.jit
    def padded(params, one):
        model, visual = nnx.merge(language.graphdef, params), projector.apply(one, test.features)
        places = captioner.first_position + np.broadcast_to(np.arange(targets.shape[1]), targets.shape)
        hidden = vlm.caption_hidden(model, tokens, visual, places)
        return losses.caption_nll(hidden, losses.Head(*model.head_weights()), targets, weights, chunk=4)

    for p in range(3):
        nll = padded(language.params, _one(projectors, p))
        assert got[p] == pytest.approx(float(nll.sum() / weights.sum()), abs=1e-5)


def test_equal_projectors_are_computed_once_and_broken_ones_not_at_all(
    language, captioner, projectors, tests, monkeypatch
):
    first, second, third = projector.unstack(projectors)
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), third)
    stacked = projector.stack([first, broken, second, first])
    computed, edge_rows = [], runner._edge_rows

    def counted(language, params, projectors, *rest):
        computed.append(len(projectors))
        return edge_rows(language, params, projectors, *rest)

    monkeypatch.setattr(runner, "_edge_rows", counted)
    got = runner.evaluate(language, language.params, stacked, tests, captioner)["free"]
    plain = runner.evaluate(language, language.params, projectors, tests, captioner)["free"]
    assert computed == [2, 3]
    np.testing.assert_array_equal(got.nll[0], got.nll[3])
    np.testing.assert_allclose(got.nll[[0, 2]], plain.nll[:2], atol=1e-5)
    assert np.isnan(got.nll[1]).all() and np.isnan(got.correct[1]).all() and np.isnan(got.control_nll[1]).all()
    only_broken = runner.evaluate(language, language.params, projector.stack([broken]), tests, captioner)
    assert np.isnan(only_broken["shapes"].nll).all()
    table = summarise(["w0", "expert:free", "joint", "average"], [{"free": got}], ["free"])
    assert np.isnan(table["expert:free"]["free"]["retrieval"]["mean"]) and np.isfinite(
        table["w0"]["free"]["loss"]["low"]
    )


def test_one_compilation_serves_all_domains_and_projectors(language, captioner, projectors, tests):
    runner._edges.clear_cache()
    runner.evaluate(language, language.params, projectors, tests, captioner)
    assert runner._edges._cache_size() == 1
    runner.evaluate(language, language.params, projector.stack([_one(projectors, p) for p in (2, 1)]), tests, captioner)
    assert runner._edges._cache_size() == 1


def test_a_projector_meets_the_images_of_one_call_alone(language, captioner, projectors, tests, monkeypatch):
    """All test images of a large run at once would be more than a device holds."""
    seen, apply = [], projector.apply
    monkeypatch.setattr(runner, "_SLOTS_A_CALL", 128)  # one row
    monkeypatch.setattr(projector, "apply", lambda params, x: (seen.append(x.shape[:-1]), apply(params, x))[1])
    runner._edges.clear_cache()
    got = runner.evaluate(language, language.params, projectors, tests, captioner)["free"]
    everything = VISUAL * sum(len(test.features) for test in tests.values())
    assert seen and max(map(math.prod, seen)) < everything
    monkeypatch.undo()
    plain = runner.evaluate(language, language.params, projectors, tests, captioner)["free"]
    np.testing.assert_allclose(got.nll, plain.nll, atol=1e-5)


def test_every_token_is_computed_once_with_little_padding():
    """Slots used = prefixes + distinct proper beginnings of an image's captions; padding under 8 % on 96 images."""
    generator = np.random.default_rng(3)
    captions = [(*generator.integers(5, 15, generator.integers(1, 9)).tolist(), 1) for _ in range(96)]
    questions = [Question(i, (captions[i], *(captions[(i + j) % 96] for j in range(1, 8)))) for i in range(96)]
    packed = tasks.pack(questions, 16, [2])
    begun = sum(len({c[:n] for c in question.captions for n in range(1, len(c))}) for question in questions)
    assert packed.used == 96 * 17 + begun
    assert packed.used / packed.tokens.size > 0.92
    assert (packed.mask.diagonal(axis1=1, axis2=2)).all()  # nobody's softmax is empty
    assert not np.triu(packed.mask, 1).any()  # and nobody sees ahead


def test_closed_answers_share_their_beginnings():
    question = Question(0, tuple((9, 10 + colour, 20 + shape, 1) for colour in range(8) for shape in range(3)))
    packed = tasks.pack([question], 16, [2])
    assert packed.used == 17 + 1 + 8 + 24  # 24 captions of four tokens: no 24 * 3 = 72 slots


def test_drawn_captions_depend_on_the_item_alone(captioner, tests):
    test = tests["free"]
    asked = tasks.retrieval("free", test, captioner, 8, seed=1)
    backwards = TestSet(test.features[::-1], test.captions[::-1], test.keys[::-1])
    assert [q.captions for q in tasks.retrieval("free", backwards, captioner, 8, seed=1)][::-1] == [
        q.captions for q in asked
    ]
    assert all(len(set(q.captions)) == len(q.captions) == 8 for q in asked)
    assert [q.captions[0] for q in asked] == [tuple(captioner.caption_ids(caption)) for caption in test.captions]
    assert asked != tasks.retrieval("free", test, captioner, 8, seed=2)


def test_bad_input_is_told(language, captioner, projectors, tests):
    test = tests["free"]
    with pytest.raises(InputError, match="no test items"):
        TestSet.of([])
    one = TestSet(test.features[:2], ("a cat", "a cat"), ("x", "y"))
    with pytest.raises(InputError, match="cats share one caption"):
        runner.evaluate(language, language.params, projectors, {"cats": one}, captioner)
    wide = TestSet(np.zeros((2, VISUAL + 1, CHANNELS), np.float32), ("a", "in"), ("x", "y"))
    with pytest.raises(InputError, match="wide has 5 visual tokens an image, not 4"):
        runner.evaluate(language, language.params, projectors, {"wide": wide}, captioner)
    with pytest.raises(InputError, match="give 2 or more"):
        tasks.retrieval("free", test, captioner, choices=1)
    assert tasks.shuffled(one, captioner, 2) == []
