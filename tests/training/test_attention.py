"""The splash kernel, run step by step on this machine, gives XLA's attention and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivotjax.errors import InputError
from pivotjax.models.language import DecoderConfig
from pivotjax.training.attention import check_splash, splash

SIZES = dict(vocab_size=8, dim=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=8)


def reference(q, k, v, segments):
    """Attention by its formula, in float32 NumPy order: softmax(q k / sqrt(d)) v over earlier tokens of the segment."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    seen = np.tri(q.shape[1], dtype=bool) & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v, precision="highest")


@pytest.mark.parametrize("length, width, packed", [(20, 32, False), (150, 128, True)])
def test_splash_is_attention(length, width, packed):
    rng = np.random.default_rng(0)
    q, k, v, slope = (jnp.asarray(rng.normal(size=(2, length, heads, width)), jnp.float32) for heads in (4, 2, 2, 4))
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1) if packed else np.ones((2, length), int)
    given = jnp.asarray(segments, jnp.int32) if packed else None

    def pulled(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(slope * attend(*x)), argnums=(0, 1, 2))(q, k, v)

    attend = splash(None, given, interpret=True)
    np.testing.assert_allclose(attend(q, k, v), reference(q, k, v, segments), rtol=0, atol=1e-5)
    _, found = pulled(attend)
    _, expected = pulled(lambda *x: reference(*x, segments))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes, platform, tensor, said",
    [
        ({}, "cpu", 1, "these devices are cpu"),
        ({"windows": (16,)}, "tpu", 1, "windows of 16 tokens are shorter than rows of 20"),
        ({}, "tpu", 4, "cannot spread 2 key heads over mesh.tensor = 4"),
    ],
)
def test_where_splash_cannot_serve(changes, platform, tensor, said):
    with pytest.raises(InputError, match=said):
        check_splash(DecoderConfig(**SIZES, **changes), 20, platform, tensor)
