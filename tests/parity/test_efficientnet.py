"""EfficientNet-Lite0 against torch, built here from the published block strings, on the same real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from pivotjax.data.images import render
from pivotjax.data.sources import source
from pivotjax.errors import InputError
from pivotjax.models.vision import efficientnet_lite, encode, load_encoder

pytestmark = pytest.mark.assets

# Tan and Le's table 1 in the notation of the TensorFlow release, squeeze-and-excite removed (Lite).
BLOCKS = (
    "r1_k3_s1_e1_o16 r2_k3_s2_e6_o24 r2_k5_s2_e6_o40 r3_k3_s2_e6_o80 "
    "r3_k5_s1_e6_o112 r4_k5_s2_e6_o192 r1_k3_s1_e6_o320"
)


class Reference:
    """The network in torch, BatchNorm not folded, grouped convolutions, channels first."""

    def __init__(self, path):
        self.state = torch.load(path, weights_only=True)

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        pads = [max((-(-n // stride) - 1) * stride + weight.shape[2] - n, 0) for n in x.shape[2:]]  # TF "SAME"
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return F.conv2d(x, weight, stride=stride, groups=1 if weight.shape[1] > 1 or x.shape[1] == 1 else x.shape[1])

    def norm(self, x, name):
        get = {part: self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, *get.values(), eps=1e-3)

    def features(self, images):
        x = (torch.tensor(images).permute(0, 3, 1, 2).float() - 127) / 128
        x = F.relu6(self.norm(self.conv(x, "_conv_stem", 2), "_bn0"))
        number = 0
        for block in BLOCKS.split():
            option = {word[0]: int(word[1:]) for word in block.split("_")}
            for repeat in range(option["r"]):
                name, stride, y = f"_blocks.{number}.", option["s"] if repeat == 0 else 1, x
                if option["e"] > 1:
                    y = F.relu6(self.norm(self.conv(y, f"{name}_expand_conv"), f"{name}_bn0"))
                y = F.relu6(self.norm(self.conv(y, f"{name}_depthwise_conv", stride), f"{name}_bn1"))
                y = self.norm(self.conv(y, f"{name}_project_conv"), f"{name}_bn2")
                x = x + y if y.shape == x.shape and stride == 1 else y
                number += 1
        return F.relu6(self.norm(self.conv(x, "_conv_head"), "_bn1"))

    def classify(self, images):
        return F.linear(self.features(images).mean((2, 3)), self.state["_fc.weight"], self.state["_fc.bias"])

    def tokens(self, images):
        pooled = F.adaptive_avg_pool2d(self.features(images), 4).flatten(2).transpose(1, 2)
        return F.layer_norm(pooled, pooled.shape[-1:])


@pytest.fixture(scope="module")
def weights(assets):
    return assets("efficientnet-lite0")["efficientnet-lite0"]


@pytest.fixture(scope="module")
def encoder(weights):
    return load_encoder(weights)


@pytest.fixture(scope="module")
def emoji(assets):
    return {item.caption: item for item in source("emoji").items(assets("openmoji", "emoji-names"))}


@pytest.fixture(scope="module")
def images(emoji):
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    return np.stack([noise, *(render(emoji[name]) for name in ("red apple", "umbrella", "zebra"))])


def network(encoder):
    return nnx.merge(encoder.graphdef, encoder.params)


def test_map_logits_and_tokens_agree_with_torch(encoder, weights, images):
    reference = Reference(weights)
    both = jax.jit(lambda x: (network(encoder).features(x), network(encoder).classify(x)))
    features, logits = both(images)
    with torch.no_grad():
        expected = reference.features(images).permute(0, 2, 3, 1).numpy()
        expected_logits, expected_tokens = reference.classify(images).numpy(), reference.tokens(images).numpy()
    assert features.shape == expected.shape == (4, 7, 7, 1280) and expected.max() > 5
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=0)
    tokens = encode(encoder, images)
    assert tokens.shape == (4, encoder.num_tokens, encoder.dim) and tokens.dtype == jnp.float32
    np.testing.assert_allclose(tokens, expected_tokens, atol=1e-4, rtol=0)


def test_predictions_on_rendered_pictures_are_sane(encoder, emoji):
    # Flat drawings are not photographs, so: among the five likeliest of 1,000 classes.
    classes = {"umbrella": 879, "soccer ball": 805, "computer mouse": 673, "banana": 954, "violin": 889,
               "accordion": 401, "basketball": 430, "horizontal traffic light": 920}  # fmt: skip
    pictures = np.stack([render(emoji[name]) for name in classes])
    logits = np.asarray(jax.jit(lambda x: network(encoder).classify(x))(pictures))
    ranks = {name: int((row > row[i]).sum()) for (name, i), row in zip(classes.items(), logits)}
    assert max(ranks.values()) < 5, ranks
    assert ranks["umbrella"] == ranks["soccer ball"] == ranks["computer mouse"] == 0


def test_features_do_not_depend_on_the_batch(encoder, images):  # but for the order of sums in float32
    alone = np.concatenate([encode(encoder, images[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(encode(encoder, images)[:2], alone, atol=1e-4, rtol=0)


def test_one_compilation_a_batch_size_and_one_normalisation(encoder, images):
    from pivotjax.models.vision import _encode

    encode(encoder, images)
    before = _encode._cache_size()
    tokens = np.asarray(encode(encoder, images[::-1].copy()))
    assert _encode._cache_size() == before
    np.testing.assert_allclose(tokens.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(tokens.std(-1), 1, atol=1e-2)


def test_wrong_images_and_wrong_files_are_one_clear_line(encoder, images, tmp_path):
    for wrong in (images[0], images[:, :100], images.astype(np.float32)):
        with pytest.raises(InputError, match="uint8"):
            encode(encoder, wrong)
    with pytest.raises(InputError, match="cannot read"):
        load_encoder(tmp_path / "absent.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="EfficientNet-Lite0"):
        load_encoder(tmp_path / "other.pth")
    state = {"_conv_stem.weight": torch.ones(8, 3, 3, 3), "_blocks.0._depthwise.weight": torch.ones(2)}
    torch.save(state, tmp_path / "renamed.pth")
    with pytest.raises(InputError, match=r"missing.*unknown.*_blocks.0._depthwise.weight \(nearest: _blocks.0._depth"):
        load_encoder(tmp_path / "renamed.pth")


def test_stages_are_the_published_ones():
    stages = efficientnet_lite.LITE0.stages
    ours = [f"r{s.repeats}_k{s.kernel}_s{s.stride}_e{s.expand}_o{s.channels}" for s in stages]
    assert ours == BLOCKS.split()
