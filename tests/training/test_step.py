"""The training step: experts apart though together, frozen weights frozen, no arithmetic that is not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_backbone import CAPTION, CONFIG, FEATURE, PROMPT, VISUAL, build

from pivotjax.models import projector


def run(tiny, state, batches):
    step, losses = jax.jit(tiny.step()), []
    for batch in batches:
        state, metrics = step(state, tiny.frozen, batch)
        losses.append(np.asarray(metrics.loss))
    return state, np.stack(losses)


def alone(tiny, batches, expert):
    own = [{name: a[expert : expert + 1] for name, a in batch.items()} for batch in batches]
    return run(tiny, tiny.state(1), own)


def test_experts_together_equal_each_alone(tiny):
    batches = [tiny.batch(seed % 2) for seed in range(20)]
    _, together = run(tiny, tiny.state(3), batches)
    for k in range(3):
        _, losses = alone(tiny, batches, k)
        np.testing.assert_allclose(together[:, k], losses[:, 0], rtol=1e-5, atol=1e-5)
    assert np.all(together[-2:].mean(0) < together[:2].mean(0) - 0.01)  # and they learn these two batches


def test_experts_together_equal_each_alone_in_float64():
    with jax.enable_x64(True):
        tiny = build(jnp.float64)
        batches = [tiny.batch(seed, dtype=np.float64) for seed in range(20)]
        together, _ = run(tiny, tiny.state(3), batches)
        assert all(a.dtype == jnp.float64 for a in jax.tree.leaves(together.params))
        for k, params in enumerate(projector.unstack(together.params)):
            single, _ = alone(tiny, batches, k)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(projector.unstack(single.params)[0])):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_an_expert_that_turns_nan_stops_and_the_others_go_on(tiny):
    batches = [tiny.batch(seed) for seed in range(6)]
    clean, _ = run(tiny, tiny.state(3), batches)
    before, _ = run(tiny, tiny.state(3), batches[:3])
    batches[3]["features"][1] = np.nan
    state, losses = run(tiny, tiny.state(3), batches)
    assert np.asarray(state.alive).tolist() == [True, False, True]
    assert np.isnan(losses[3, 1]) and np.isfinite(losses[:, [0, 2]]).all()
    for k, expected in ((0, clean), (1, before), (2, clean)):
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params)):
            np.testing.assert_array_equal(a[k], b[k])


def test_frozen_weights_stay_and_are_held_once_whatever_k_is(tiny):
    before = jax.tree.map(np.array, tiny.frozen)
    run(tiny, tiny.state(2), [tiny.batch(0, experts=2)])
    jax.tree.map(np.testing.assert_array_equal, before, tiny.frozen)

    backbone = sum(a.nbytes for a in jax.tree.leaves(tiny.frozen))

    def held(experts):
        state, batch = tiny.state(experts), tiny.batch(0, experts=experts)
        compiled = jax.jit(tiny.step(), donate_argnums=0).lower(state, tiny.frozen, batch).compile()
        memory = compiled.memory_analysis()
        own = sum(np.asarray(a).nbytes for a in jax.tree.leaves((state, batch)))
        assert memory.argument_size_in_bytes <= backbone + own + 4096
        return memory.argument_size_in_bytes - own

    assert abs(held(1) - held(6)) < 4096


def dot_flops(jaxpr, trips=1):
    """Multiply-adds x 2 of every dot product in a jaxpr, loop bodies times their trips; (total, largest row count of a
    product with the vocabulary)."""
    total, vocabulary_rows = 0, 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[i] for i in contract])) * trips
            if CONFIG.vocab_size in out:
                vocabulary_rows = max(vocabulary_rows, int(np.prod(out)) // CONFIG.vocab_size)
        inner = trips * equation.params.get("length", 1) if equation.primitive.name == "scan" else trips
        for value in equation.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    flops, rows = dot_flops(sub, inner)
                    total, vocabulary_rows = total + flops, max(vocabulary_rows, rows)
    return total, vocabulary_rows


@pytest.mark.parametrize("experts", [1, 3])
def test_no_arithmetic_beyond_the_minimum(tiny, experts):
    """Frozen layers: one product forward, one back to their inputs, none for their weights; logits at captions only."""
    size, length, c = 4, VISUAL + PROMPT + CAPTION - 1, CONFIG
    samples, state, batch = experts * size, tiny.state(experts), tiny.batch(0, experts, size)
    flops, vocabulary_rows = dot_flops(jax.make_jaxpr(tiny.step())(state, tiny.frozen, batch).jaxpr)

    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = c.num_layers * (c.dim * (2 * heads + 2 * kv) + 3 * c.dim * c.mlp_dim)
    attention = c.num_layers * 2 * length * length * heads  # scores and mixing, multiply-adds a sample
    logits = CAPTION * c.dim * c.vocab_size
    frozen = (
        samples * (2 * length * weights + 3 * attention + 2 * logits) * 2
    )  # attention: both operands need gradients
    rows = samples * VISUAL
    projecting = 2 * rows * (2 * FEATURE * c.dim + 3 * c.dim * c.dim)  # first layer: no gradient of the features
    minimum = frozen + projecting
    assert minimum * 0.95 <= flops <= 1.10 * minimum, (flops, minimum, flops / minimum)
    assert vocabulary_rows == samples * CAPTION


@pytest.mark.parametrize("remat", ["layers", "dots"])
def test_remat_changes_memory_not_numbers(tiny, remat):
    batch = tiny.batch(0)
    plain, _ = jax.jit(tiny.step())(tiny.state(3), tiny.frozen, batch)
    again, _ = jax.jit(tiny.step(remat=remat))(tiny.state(3), tiny.frozen, batch)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(again.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_is_each_experts_own(tiny):
    """A huge gradient of one expert must not shrink another's step."""
    batches = [tiny.batch(seed, experts=2) for seed in range(3)]
    calm, _ = run(tiny, tiny.state(2), batches)
    batches[1]["features"][0] *= 1000
    loud, _ = run(tiny, tiny.state(2), batches)
    for x, y in zip(jax.tree.leaves(calm.params), jax.tree.leaves(loud.params)):
        np.testing.assert_array_equal(x[1], y[1])
    assert not np.allclose(calm.params["linear_1"]["kernel"][0], loud.params["linear_1"]["kernel"][0], rtol=1e-6)


def test_bfloat16_backbone_keeps_a_float32_projector(tiny):
    """The frozen model in bfloat16, projector, optimizer and loss in float32: nearly the same loss and gradient."""
    half = build(jnp.bfloat16)
    half = half._replace(w0=tiny.w0, frozen=jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.frozen))
    batch = tiny.batch(0)
    state, metrics = jax.jit(half.step())(half.state(3), half.frozen, batch)
    _, expected = jax.jit(tiny.step())(tiny.state(3), tiny.frozen, batch)
    assert metrics.loss.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-2)
    np.testing.assert_allclose(metrics.gradient_norm, expected.gradient_norm, rtol=5e-2)
