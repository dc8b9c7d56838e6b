"""Connectors against transformers' Idefics3 and LLaVA, and torch's average pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pivotjax.checkpoints import names
from pivotjax.errors import InputError
from pivotjax.models import connectors, projector

TEXT = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
RNG = np.random.default_rng(0)


def features(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def params_of(module, table, kind, d_in, d_out, bias):
    """A torch module's weights, read with our table of names."""
    shapes = jax.eval_shape(lambda: projector.init(kind, d_in, d_out, jax.random.key(0), 1.0))
    shapes = {
        name: {"kernel": layer["kernel"]} | ({"bias": layer["bias"]} if bias else {}) for name, layer in shapes.items()
    }
    return names.load({name: value.numpy() for name, value in module.state_dict().items()}, table, shapes)


@pytest.mark.parametrize("scale, side", [(2, 4), (3, 9), (4, 4), (2, 26)])
def test_pixel_shuffle_and_linear_are_idefics3s(scale, side):
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": 12, "num_attention_heads": 2}, text_config=TEXT, scale_factor=scale
    )
    torch.manual_seed(0)
    module, kind = Idefics3Connector(config), f"pixel_shuffle{scale}_linear"
    params = params_of(module, connectors.idefics3_names(), kind, connectors.width(kind, 12), 8, bias=False)
    x = features(2, side**2, 12)
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
        shuffled = module.pixel_shuffle(torch.tensor(x), scale).numpy()
    np.testing.assert_array_equal(connectors.reduce(kind, x), shuffled)
    found = connectors.apply(kind, params, x)
    assert found.shape == expected.shape == (2, connectors.num_tokens(kind, side**2), 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scale, side", [(2, 4), (3, 9), (4, 4)])
def test_average_pooling_is_torchs(scale, side):
    x, kind = features(2, side**2, 6), f"avg_pool{scale}_mlp2x_gelu"
    grid = torch.tensor(x).permute(0, 2, 1).reshape(2, 6, side, side)
    expected = F.avg_pool2d(grid, scale).flatten(2).permute(0, 2, 1).numpy()
    np.testing.assert_allclose(connectors.reduce(kind, x), expected, atol=1e-6)
    assert expected.shape[1:] == (connectors.num_tokens(kind, side**2), connectors.width(kind, 6))


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layers_are_llavas(bias):
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 12}, multimodal_projector_bias=bias,
        text_config=TEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    module, kind = LlavaMultiModalProjector(config), "mlp2x_gelu"
    params = params_of(module, connectors.llava_names(kind, bias), kind, 12, 8, bias)
    x = features(2, 5, 12)
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
    np.testing.assert_allclose(connectors.apply(kind, params, x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixel_shuffle2_mlp2x_gelu", "avg_pool2_linear", "mlp3x_gelu"])
def test_what_is_reduced_first_or_inside_is_the_same(kind):
    """Training caches reduced features and stacks experts; a whole model reduces in its forward pass."""
    x = jnp.asarray(features(3, 16, 6))
    keys = jax.random.split(jax.random.key(0), 3)
    experts = [projector.init(kind, connectors.width(kind, 6), 10, key, 1.0) for key in keys]
    assert set(experts[0]) == {f"linear_{i}" for i in range(projector.depth(kind))}
    together = projector.apply_stacked(projector.stack(experts), connectors.reduce(kind, x)[:, None])
    for k, params in enumerate(experts):
        np.testing.assert_allclose(together[k], connectors.apply(kind, params, x[k : k + 1]), atol=1e-5)
    seen = projector.layer_inputs(experts[0], connectors.reduce(kind, x))
    assert seen["linear_0"].shape == (3, connectors.num_tokens(kind, 16), connectors.width(kind, 6))


def test_kinds_taken_apart():
    assert projector.parse("linear") == (None, 1, 1) and projector.parse("mlp3x_gelu") == (None, 1, 3)
    assert projector.parse("pixel_shuffle4_linear") == ("pixel_shuffle", 4, 1)
    assert projector.parse("avg_pool2_mlp2x_gelu") == ("avg_pool", 2, 2)
    spatial = {
        kind: connectors.spatial(kind) for kind in ("mlp2x_gelu", "avg_pool2_mlp2x_gelu", "pixel_shuffle3_linear")
    }
    assert list(spatial.values()) == ["linear", "avg_pool2_linear", "pixel_shuffle3_linear"]
    for unknown in (
        "",
        "mlp2x_relu",
        "pixel_shuffle1_linear",
        "pixel_shuffle2",
        "avg_pool2_",
        "avgpool2_linear",
        "mlp0x_gelu",
    ):
        with pytest.raises(InputError, match="is unknown; use `linear`"):
            projector.parse(unknown)


@pytest.mark.parametrize("tokens", [15, 17, 9])
def test_grids_that_cannot_be_cut(tokens):
    for call in (
        lambda kind: connectors.reduce(kind, features(1, tokens, 3)),
        lambda kind: connectors.num_tokens(kind, tokens),
    ):
        with pytest.raises(InputError, match=f"{tokens} tokens are no square grid with a side that 2 divides"):
            call("pixel_shuffle2_linear")
    assert connectors.num_tokens("linear", tokens) == tokens
