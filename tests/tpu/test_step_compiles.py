"""The training step through the real TPU compiler, ahead of time, on a tiny model: what is spread over the chips is
gathered a layer at a time, and the splash kernel lowers. Nothing is run: no TPU is here."""

import re

import jax
import jax.numpy as jnp
import pytest

from pivotjax.models import projector
from pivotjax.models.language import FAMILIES, DecoderConfig, abstract
from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
from pivotjax.training.parallel import MeshConfig, layout, make_mesh, shardings
from pivotjax.training.step import Network, init_state, make_step

EXPERTS, ROWS, IMAGES, VISUAL, CAPTION, FEATURE = 2, 4, 2, 120, 28, 256
LENGTH = IMAGES * (VISUAL + CAPTION)
CONFIG = DecoderConfig(
    vocab_size=1024, dim=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=512
)  # fmt: skip


def shapes(optimizer):
    """State, frozen weights and a packed batch, as shapes."""
    graphdef, params = abstract(FAMILIES["llama"], CONFIG, jnp.bfloat16)

    def fresh():
        w0 = projector.init("mlp2x_gelu", FEATURE, CONFIG.dim, jax.random.key(0), 0.1)
        return init_state(w0, EXPERTS, optimizer)

    def of(*size, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((EXPERTS, ROWS, *size), dtype)

    batch = {name: of(LENGTH) for name in ("tokens", "segments", "positions")}
    batch |= {name: of(IMAGES * CAPTION) for name in ("targets", "places")}
    batch |= {"weights": of(IMAGES * CAPTION, dtype=jnp.float32)}
    batch |= {"features": of(IMAGES, VISUAL, FEATURE, dtype=jnp.bfloat16)}
    return graphdef, {"state": jax.eval_shape(fresh), "frozen": {"language": params}, "batch": batch}


@pytest.mark.tpu
@pytest.mark.slow
def test_the_step_compiles_for_v5e(tpu):
    training = TrainingConfig(remat="layers", attention="splash", loss_chunk=8)
    optimizer = per_expert(adamw(training))
    placed = layout("jit", make_mesh(MeshConfig(1, 1, 2, 2), EXPERTS, ROWS, tpu("v5e:2x2")))
    graphdef, parts = shapes(optimizer)
    arguments = [
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            shardings(placed.mesh, root, tree),
        )
        for root, tree in parts.items()
    ]
    compiled = placed.compile(make_step(Network(graphdef), optimizer, training, placed)).lower(*arguments).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text  # the kernel
    gathered = re.findall(r"= bf16\[([\d,]*)\]\S* all-gather\(", text)
    assert {"512,256", "256,256"} & set(gathered)  # one layer's matrices, still cut along `tensor`
    stacked = [found for found in gathered if found.startswith(f"{CONFIG.num_layers},")]
    assert not stacked  # never all layers' at once
    assert f"{LENGTH},{LENGTH}]" not in text  # nor any attention's scores
