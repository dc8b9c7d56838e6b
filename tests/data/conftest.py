"""A cheap stand-in for the encoder, and items to feed it: what these tests check is order, storage and batching."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pivotjax.data.captions import Captioner
from pivotjax.data.sources.base import Item
from pivotjax.models import vision

SIDE = 16


def patch_means(images: np.ndarray) -> np.ndarray:
    """Features [B, 4, 3]: the mean colour of each quarter of the image, in [0, 1]."""
    quarters = np.asarray(images, np.float32).reshape(len(images), 2, SIDE // 2, 2, SIDE // 2, 3).mean((2, 4))
    return quarters.reshape(len(images), 4, 3) / 255


@pytest.fixture
def encoder(monkeypatch) -> vision.Encoder:
    """An encoder of 16-pixel images that gives `patch_means`; `encoder.params["calls"]` lists its batch sizes."""
    calls = []

    def encode(encoder, images):
        calls.append(len(images))
        return patch_means(images)

    monkeypatch.setattr(vision, "encode", encode)
    return vision.Encoder("means", None, {"calls": calls}, SIDE, 4, 3, "identity-of-means")


@pytest.fixture
def make_items():
    """`make_items(n, domain)`: SVGs of n different grey levels."""

    def make(n: int, domain: str = "greys") -> list[Item]:
        svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="{}"/></svg>'
        return [
            Item(f"{domain}/{i}", f"{domain} {i}", f"number {i}", svg.format(f"rgb({i},{i},{i})").encode(), "svg")
            for i in range(n)
        ]

    return make


@pytest.fixture
def captioner() -> Captioner:
    """Words are tokens: "show :" is the prompt, three visual tokens, captions of up to five tokens."""
    words = ["[?]", "<end>", "show", ":", "a", "blue", "circle", "cat", "number", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[?]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Captioner(tokenizer, eos_id=1, prompt="show :", num_visual=3, max_caption=5)
