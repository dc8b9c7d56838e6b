"""What the frozen LLM says of calibration pairs, against `jax.grad` of one plain example at a time."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import pivotjax
from pivotjax.data.captions import Captioner
from pivotjax.errors import InputError
from pivotjax.jobs import calibration
from pivotjax.jobs.assemble import Frozen
from pivotjax.jobs.calibration import CalibrationConfig
from pivotjax.models import projector
from pivotjax.models.language import Decoder, DecoderConfig, Language, load_language

VISUAL, CHANNELS, DIM = 4, 6, 32
WORDS = ("a", "big", "cat", "dog", "in", "the", "house", "on", "fire", "red", "blue")


@dataclass(frozen=True)
class Source:
    """A domain's calibration split in memory."""

    path: str
    samples: tuple

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make_source(name, count, seed, words=WORDS, channels=CHANNELS):
    rng = np.random.default_rng(seed)
    captions = [" ".join(rng.choice(words, rng.choice((1, 5)))) for _ in range(count)]
    features = rng.normal(size=(count, VISUAL, channels)).astype(np.float32) + rng.normal(size=channels)
    return Source(name, tuple({"features": f.astype(np.float32), "caption": c} for f, c in zip(features, captions)))


@pytest.fixture(scope="module")
def language() -> Language:
    config = DecoderConfig(32, DIM, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1]))()
    params["embedding"] = 30.0 * params["embedding"]
    vocabulary = {"<unk>": 0, "<end>": 1, "\n": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return Language("tiny", config, graphdef, params, tokenizer, 1, "none")


@pytest.fixture(scope="module")
def frozen(language) -> Frozen:
    captioner = Captioner(language.tokenizer, language.eos_id, prompt="\n", num_visual=VISUAL, max_caption=8)
    return Frozen(language, None, captioner)


@pytest.fixture(scope="module")
def experts() -> projector.Params:
    keys = jax.random.split(jax.random.key(1), 2)
    return projector.stack([projector.init("mlp2x_gelu", CHANNELS, DIM, key, 0.3) for key in keys])


SOURCES = ((make_source("cats", 7, 1),), (make_source("dogs", 5, 2), make_source("birds", 4, 3)))


@pytest.fixture
def data(frozen, monkeypatch):
    """5 of 7, 5 of 5 and 4 of 4 pairs in batches of 3: the last one of 14 captions is filled up."""
    monkeypatch.setattr(calibration, "_SLOTS_A_CALL", 3 * frozen.captioner.length)
    return calibration.of_experts(frozen, SOURCES, CalibrationConfig(images=6, captions=5, examples=5))


def pairs(sources, most):
    return [sample for source in sources for sample in source.samples[:most]]


@partial(jax.jit, static_argnums=(0, 1))
def plain(graphdef, objective, frozen, params, features, prompt, caption):
    """Loss summed over the caption's tokens, and its gradient, of one pair: no batch, no padding, no splicing."""

    def cost(params):
        model = nnx.merge(graphdef, frozen)
        text = model.embed(jnp.concatenate([prompt, caption[:-1]]))
        x = jnp.concatenate([projector.apply(params, features), text])[None]
        hidden, _ = model(x, jnp.arange(x.shape[1])[None], None)
        logs = jax.nn.log_softmax(model.logits(hidden[0, -len(caption) :]))
        if objective == "entropy":
            return -(jnp.exp(logs) * logs).sum()
        return -logs[jnp.arange(len(caption)), caption].sum()

    return jax.value_and_grad(cost)(params)


def plain_of(frozen, objective, params, sample):
    language, captioner = frozen.language, frozen.captioner
    ids = np.array(captioner.caption_ids(sample["caption"]))
    pair = sample["features"], np.array(captioner.prompt_ids), ids
    loss, gradient = plain(language.graphdef, objective, language.params, params, *pair)
    return float(loss), jax.tree.map(lambda g: np.asarray(g, np.float64), gradient), len(ids)


def one(stacked, k):
    return jax.tree.map(lambda leaf: leaf[k], stacked)


def assert_trees_close(got, want, tolerance):
    """Within `tolerance` of each leaf's largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_fisher_is_the_mean_of_squared_gradients_one_example_at_a_time(frozen, experts, data):
    got = data.fisher(experts)
    for k, own in enumerate(SOURCES):
        gradients = [plain_of(frozen, "caption", one(experts, k), sample)[1] for sample in pairs(own, 5)]
        want = jax.tree.map(lambda *leaves: np.mean(np.square(leaves), axis=0), *gradients)
        assert_trees_close(one(got, k), want, 1e-4)


@pytest.mark.parametrize("objective", ["caption", "entropy"])
def test_gradients_are_those_of_the_plain_loss_pooled_over_tokens(frozen, experts, data, objective):
    losses, gradients = data.loss_gradient(experts, objective)
    samples = pairs([source for own in SOURCES for source in own], 5)
    for p in range(2):
        each, slopes, tokens = zip(*(plain_of(frozen, objective, one(experts, p), sample) for sample in samples))
        assert float(losses[p]) == pytest.approx(sum(each) / sum(tokens), abs=1e-5)
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *slopes)
        share = sum(tokens) / len(samples)  # from a mean over pairs to one over tokens
        assert_trees_close(jax.tree.map(partial(jnp.multiply, share), one(gradients, p)), mean, 1e-4)
    if objective == "caption":
        np.testing.assert_allclose(data.loss(experts), losses, atol=1e-5)


def test_alignment_is_that_of_mean_visual_tokens_and_mean_embeddings(frozen, experts, data):
    table = np.asarray(frozen.language.params["embedding"], np.float64)
    samples = pairs([source for own in SOURCES for source in own], 6)
    y = np.stack([table[frozen.captioner.caption_ids(s["caption"])[:-1]].mean(0) for s in samples])
    cosines, kernels = data.alignment(experts, "cosine"), data.alignment(experts, "cka")
    for p in range(2):
        visual = [np.asarray(projector.apply(one(experts, p), s["features"]), np.float64) for s in samples]
        x = np.stack([v.mean(0) for v in visual])
        want = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y)])
        assert float(cosines[p]) == pytest.approx(want, abs=1e-5)
        x, z = x - x.mean(0), y - y.mean(0)
        want = np.linalg.norm(x.T @ z) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(z.T @ z)
        assert float(kernels[p]) == pytest.approx(want, abs=1e-5)


def test_fisher_holds_one_gradient_whatever_the_batch(language, frozen):
    """A projector of 1.3 M parameters: 30 more pairs a batch must cost less memory than two more gradients."""
    params = projector.init("mlp2x_gelu", 40000, DIM, jax.random.key(0), 0.3)
    source = make_source("wide", 32, 1, channels=40000)

    def held(size):
        batch = next(calibration._Pairs((source,), size).batches(frozen.captioner, size))
        program = (language.graphdef, frozen.captioner.first_position)
        total = jax.tree.map(jnp.zeros_like, params)
        lowered = calibration._add_squares.lower(*program, total, language.params, params, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held(2) > gradient  # the measure sees a gradient
    assert held(32) - held(2) < 2 * gradient


def test_methods_run_on_it(experts, data):
    """Fisher and AdaMerging of projectors through the LLM: the loss goes down from the plain sum's."""
    base = jax.tree.map(lambda leaf: leaf.mean(0) * 0.9, experts)
    named = {"cats": one(experts, 0), "others": one(experts, 1)}
    merged = pivotjax.merge(base, named, "adamerging", calibration=data, lr=0.05, steps=12)
    losses = merged.report["facts"]["losses"]
    final = data.loss(jax.tree.map(lambda leaf: leaf[None], merged.params))
    assert len(losses) == 12 and float(final[0]) < losses[-1] < losses[0]
    merged = pivotjax.merge(None, named, "fisher", calibration=data)
    for facts in merged.report["layers"].values():
        assert sum(facts["weights"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["fisher", "adamerging"])
def test_a_trace_is_refused_in_one_line(experts, data, method):
    def merged(experts):
        named = {"cats": one(experts, 0), "others": one(experts, 1)}
        return pivotjax.merge(named["cats"], named, method, calibration=data).params

    with pytest.raises(InputError, match="no traced program"):
        jax.jit(merged)(experts)


@pytest.mark.slow
@pytest.mark.assets
def test_real_language_model_with_four_captions(assets):
    """SmolLM2-135M: the gradient agrees with a step along it, and one pair's Fisher is its squared gradient."""
    language = load_language(assets("smollm2-135m")["smollm2-135m"])
    captioner = Captioner(language.tokenizer, language.eos_id, num_visual=VISUAL)
    frozen = Frozen(language, None, captioner)
    source = make_source("real", 4, 1, words=("red", "triangle", "a", "grinning", "face", "house"))
    spread = float(jnp.std(language.params["embedding"]))
    params = projector.init("mlp2x_gelu", CHANNELS, language.config.dim, jax.random.key(0), spread)
    stacked = projector.stack([params])

    data = calibration.of_experts(frozen, [[source]], CalibrationConfig(captions=4))
    (loss,), gradient = data.loss_gradient(stacked, "caption")
    gradient = one(gradient, 0)
    square = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(gradient))
    step = 1e-2 / square  # the loss is about to change by 1e-2 nats either way
    ends = projector.stack([jax.tree.map(lambda w, g, s=s: w + s * step * g, params, gradient) for s in (1, -1)])
    up, down = data.loss(ends)
    assert float(data.loss(stacked)[0]) == pytest.approx(float(loss), abs=1e-4)
    assert float(up - down) == pytest.approx(2e-2, rel=0.05)

    data = calibration.of_experts(frozen, [[source]], CalibrationConfig(captions=1, examples=1))
    (_, gradient), (fisher,) = data.loss_gradient(stacked, "caption"), projector.unstack(data.fisher(stacked))
    tokens = len(captioner.caption_ids(source[0]["caption"]))
    want = jax.tree.map(lambda g: (tokens * np.asarray(g[0])) ** 2, gradient)
    assert_trees_close(fisher, want, 1e-3)
