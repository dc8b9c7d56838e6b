"""The training step: experts apart though together, frozen weights frozen, no arithmetic that is not needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_backbone import CAPTION, CONFIG, FEATURE, PROMPT, VISUAL, build

from pivotjax.errors import InputError
from pivotjax.models import projector, vision
from pivotjax.models.language.decoder import NO_WINDOW
from pivotjax.models.processors import Normalisation
from pivotjax.models.vision import Features, VisionConfig
from pivotjax.training.optimizer import GuardConfig, TrainingConfig, adamw
from pivotjax.training.step import judged


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
    _, in_chunks = dot_flops(jax.make_jaxpr(tiny.step(loss_chunk=2))(state, tiny.frozen, batch).jaxpr)
    assert in_chunks == samples * 2


def test_remat_changes_memory_not_numbers(tiny):
    batch = tiny.batch(0)
    plain, _ = jax.jit(tiny.step())(tiny.state(3), tiny.frozen, batch)
    again, _ = jax.jit(tiny.step(remat="layers"))(tiny.state(3), tiny.frozen, batch)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(again.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def same_step(tiny, batch, other, other_batch, tolerance=1e-6):
    """Losses and updated parameters of two steps agree."""
    (state, metrics), (other_state, other_metrics) = (
        jax.jit(t.step())(t.state(3), t.frozen, b) for t, b in ((tiny, batch), (other, other_batch))
    )
    np.testing.assert_allclose(other_metrics.loss, metrics.loss, rtol=tolerance)
    np.testing.assert_allclose(other_metrics.gradient_norm, metrics.gradient_norm, rtol=10 * tolerance)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other_state.params)):
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * tolerance)


def test_micro_batches_change_no_number(tiny):
    """Even where the parts have unequal numbers of caption tokens."""
    batch = tiny.batch(0)
    batch["weights"][:, ::2, 2:] = 0
    same_step(tiny, batch, build(device_batch=6, loss_chunk=2), batch)


def test_micro_batches_that_do_not_divide(tiny):
    with pytest.raises(InputError, match=r"4 rows on a device cannot be cut into training.accumulate = 3"):
        tiny.step(accumulate=3)(tiny.state(3), tiny.frozen, tiny.batch(0))


def test_packed_rows_train_as_unpacked_ones():
    """Two samples a row, apart by their segments; one layer sees all of a segment, the others a window of it."""
    tiny = build(config=dataclasses.replace(CONFIG, windows=(3, NO_WINDOW, 4)))
    same_step(tiny, tiny.batch(0, size=4), tiny, tiny.packed(0, size=2))


def test_pictures_are_encoded_in_the_step(tiny):
    """The same numbers as from features made before; one pass through the tower, none back."""
    config = VisionConfig(8, 4, FEATURE, 2, 2, 16, "quick_gelu", 1e-5, has_class_token=True, pre_norm=True)
    graphdef, shapes = vision.abstract(vision.FAMILIES["clip_vision_model"], config)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(scale=0.3, size=s.shape), jnp.float32), shapes)
    pictures = rng.integers(0, 256, (3, 4, 1, 8, 8, 3)).astype(np.uint8)
    how = (graphdef, Features(), Normalisation())

    def features(weights, pictures):
        flat = vision.visual_features(*how, weights, pictures.reshape(-1, 8, 8, 3))
        return flat.reshape(3, 4, 1, VISUAL, FEATURE)

    batch = tiny.batch(0) | {"features": np.asarray(features(weights, pictures))}
    online = {name: a for name, a in batch.items() if name != "features"} | {"images": pictures}
    seeing = tiny._replace(frozen=tiny.frozen | {"vision": weights}, sight=how)
    same_step(tiny, batch, seeing, online)

    def flops(function, *arguments):
        return dot_flops(jax.make_jaxpr(function)(*arguments).jaxpr)[0]

    state, tower = tiny.state(3), flops(features, weights, pictures)
    assert tower > 0
    whole = flops(seeing.step(), state, seeing.frozen, online)
    assert whole == flops(tiny.step(), state, tiny.frozen, batch) + tower


def test_an_update_may_be_skipped_where_nothing_is_finite(tiny):
    batches = [tiny.batch(seed) for seed in range(5)]
    without, _ = run(tiny, tiny.state(3), [batch for n, batch in enumerate(batches) if n != 2])
    batches[2]["features"][1] = np.inf
    patient = build(guard=GuardConfig(not_finite="skip"))
    state, losses = run(patient, patient.state(3), batches)
    assert not np.isfinite(losses[2, 1]) and np.asarray(state.alive).all()
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(without.params)):
        np.testing.assert_array_equal(a[1], b[1])
        assert np.abs(a[0] - b[0]).max() > 1e-6


def test_a_loss_that_leaps():
    """Expert 1's running mean is so low that any loss is a leap: after the warm-up it stays as it was."""
    tiny = build(guard=GuardConfig(spike="skip", spike_warmup=1))
    before = tiny.state(3)._replace(loss_average=jnp.array([4.0, 0.1, 4.0]))
    step, batch = jax.jit(tiny.step()), tiny.batch(0)
    _, early = step(before, tiny.frozen, batch)
    assert early.applied.all()
    state, metrics = step(before._replace(step=jnp.int32(1)), tiny.frozen, batch)
    assert metrics.applied.tolist() == [True, False, True] and metrics.alive.all()
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(old[1], new[1])
    assert (state.loss_average != before.loss_average).all()
    # A leap moves the mean as far as the largest loss that is none, so that a lasting one ends by being the rule.
    np.testing.assert_allclose(state.loss_average[1], 0.95 * 0.1 + 0.05 * 0.3, rtol=1e-6)
    assert np.abs(state.params["linear_0"]["kernel"][0] - before.params["linear_0"]["kernel"][0]).max() > 0


@pytest.mark.parametrize(
    "guard, alive, applied",
    [
        (GuardConfig(), [1, 0, 1], [1, 0, 1]),
        (GuardConfig(not_finite="skip"), [1, 1, 1], [1, 0, 1]),
        (GuardConfig(not_finite="abort", spike="skip"), [1, 1, 1], [1, 0, 0]),
        (GuardConfig(spike="abort", spike_factor=5.0), [1, 0, 1], [1, 0, 1]),
    ],
)
def test_what_the_guard_does(tiny, guard, alive, applied):
    """Expert 1's gradient is not finite, expert 2's loss is four times its mean."""
    state = tiny.state(3)._replace(step=jnp.int32(100), loss_average=jnp.ones(3))
    found = judged(guard, state, jnp.array([1.0, 1.0, 4.0]), jnp.array([1.0, jnp.inf, 1.0]))
    assert [a.astype(int).tolist() for a in found] == [alive, applied]


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


def test_clip_0_is_no_clipping():
    """AdamW's first moment shows the gradient as it came to it."""
    gradient = {"w": jnp.array([30.0, -40.0])}
    first = {}
    for clip in (0.0, 5.0, 100.0):
        optimizer = adamw(TrainingConfig(clip=clip))
        updates, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        first[clip] = next(a for a in jax.tree.leaves(state) if a.shape == (2,))
        assert np.abs(updates["w"]).min() > 0
    np.testing.assert_allclose(first[0.0], [3.0, -4.0], rtol=1e-6)
    np.testing.assert_array_equal(first[0.0], first[100.0])
    np.testing.assert_allclose(first[5.0], [0.3, -0.4], rtol=1e-6)
