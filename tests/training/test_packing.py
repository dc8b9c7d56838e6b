"""Packed batches as the input makes them: the model's loss and gradients are those of the same samples unpacked."""

from dataclasses import dataclass

import jax
import numpy as np
import tiny_backbone
from tiny_backbone import FEATURE, VISUAL
from tokenizers import Tokenizer, models, pre_tokenizers

from pivotjax.data.captions import Captioner
from pivotjax.data.pipeline import HOST_KEYS, Feed
from pivotjax.data.stream import Sample
from pivotjax.training.step import make_evaluation

WORDS = 40


@dataclass(frozen=True)
class Captions:
    """Samples of random features with captions of one to six words."""

    name: str

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng([index, len(self.name)])
        words = random.integers(3, WORDS, random.integers(1, 7))
        features = random.normal(size=(VISUAL, FEATURE)).astype(np.float32)
        return Sample(features=features, caption=" ".join(f"w{word}" for word in words), concept="", key=str(index))


def captioner(template: str) -> Captioner:
    words = {"[?]": 0, "<end>": 1, "\n": 2} | {f"w{n}": n for n in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[?]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return Captioner(tokenizer, 1, "w3 w4", num_visual=VISUAL, max_caption=7, template=template)


def device_batch(feed: Feed, step: int) -> dict[str, np.ndarray]:
    with feed.start(step) as batches:
        return {key: value for key, value in next(batches).items() if key not in HOST_KEYS}


def test_packed_and_unpacked_samples_have_one_loss_and_one_gradient():
    tiny = tiny_backbone.build()
    experts = {"a": [Captions("a")], "bb": [Captions("bb")]}
    feeds = [Feed(experts, captioner("prompt"), batch=6, seed=0, pack=pack) for pack in (1, 2)]
    step = jax.jit(tiny.step())
    plain, packed = (step(tiny.state(2), tiny.frozen, device_batch(feed, 1))[1] for feed in feeds)
    np.testing.assert_allclose(packed.loss, plain.loss, rtol=1e-5)
    np.testing.assert_allclose(packed.gradient_norm, plain.gradient_norm, rtol=1e-5)


def test_the_plain_template_packs_as_well():
    tiny = tiny_backbone.build()
    evaluate = jax.jit(make_evaluation(tiny.network, tiny.training))
    feeds = [Feed({"a": [Captions("a")]}, captioner("plain"), batch=6, seed=0, pack=pack) for pack in (1, 3)]
    plain, packed = (evaluate(tiny.state(1).params, tiny.frozen, device_batch(feed, 1)) for feed in feeds)
    np.testing.assert_allclose(packed[0], plain[0], rtol=1e-5)
    assert np.array_equal(packed[1], plain[1])


def test_a_tight_row_has_the_same_loss():
    """Rows just long enough for what is in them, instead of the longest that can be."""
    tiny = tiny_backbone.build()
    evaluate = jax.jit(make_evaluation(tiny.network, tiny.training))
    roomy = Feed({"a": [Captions("a")]}, captioner("prompt"), batch=6, seed=0, pack=2)
    batch = device_batch(roomy, 0)
    longest = int((batch["segments"] > 0).sum(-1).max())
    tight = Feed({"a": [Captions("a")]}, captioner("prompt"), batch=6, seed=0, pack=2, row_tokens=longest)
    assert tight.layout.length < roomy.layout.length
    expected, found = (evaluate(tiny.state(1).params, tiny.frozen, one) for one in (batch, device_batch(tight, 0)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert np.array_equal(found[1], expected[1])
