"""Fisher merging and AdaMerging where the answer is known; statistics of calibration data; what is refused."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_calibrated as reference
from small_world import flat, layer_inputs, make_world, matrices, random_params

import pivotjax
from pivotjax import InputError
from pivotjax.merging.calibration import FeatureCalibration, agreement


def close(params, want, tolerance=2e-4):
    for layer, matrix in matrices(params).items():
        target = np.hstack([want[f"{layer}/weight"], want[f"{layer}/bias"][:, None]])
        np.testing.assert_allclose(matrix, target, rtol=0, atol=tolerance * np.abs(target).max())


def referenced(world, name, **options):
    experts = {k: flat(e) for k, e in world.experts.items()}
    return reference.REFERENCES[name](flat(world.base), experts, world=world, **options)


def calibration(fisher=None, gradient=None, count=2):
    """One that says these things whatever it is asked about."""
    features = [np.ones((1, 1), np.float32)] * count
    return FeatureCalibration(layer_inputs, features, caption_fisher=fisher, caption_gradient=gradient)


def regression(examples):
    """Fisher of a linear model `w'x` with loss half the squared error, expert k on `examples[k] = (X, y)`."""

    def loss(params, x, y):
        return 0.5 * (params["scale"] @ x - y) ** 2

    def fisher(stacked):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))
        squares = [
            gradients({"scale": w}, jnp.array(x), jnp.array(y))["scale"] ** 2
            for w, (x, y) in zip(stacked["scale"], examples)
        ]
        return {"scale": jnp.stack([square.mean(0) for square in squares])}

    return fisher


def test_fisher_by_hand():
    """g = (w'x - y) x. Expert a, w = [1, 3]: residuals 1 and 2 at x = [1, 0] and [2, 0], g = [1, 0] and [4, 0], so
    F_a = [8.5, 0]. Expert b, w = [5, 1]: residual 2 at x = [.5, 1] twice, g = [1, 2], F_b = [1, 4]."""
    experts = {"a": {"scale": np.float32([1, 3])}, "b": {"scale": np.float32([5, 1])}}
    examples = [
        (np.float32([[1, 0], [2, 0]]), np.float32([0, 0])),
        (np.float32([[0.5, 1], [0.5, 1]]), np.float32([1.5, 1.5])),
    ]
    data = calibration(regression(examples))
    merged = partial(pivotjax.merge, None, experts, "fisher", calibration=data)
    np.testing.assert_allclose(merged().params["scale"], [(8.5 * 1 + 1 * 5) / 9.5, 1], rtol=1e-5)
    # Means of F_a and F_b are 4.25 and 2.5; of all entries 3.375.
    normalized = [(2 * 1 + 0.4 * 5) / 2.4, (1e-6 * 3 + 1.6 * 1) / (1.6 + 1e-6)]
    np.testing.assert_allclose(merged(normalize=True).params["scale"], normalized, rtol=1e-5)
    floored = [(8.5 * 1 + 1.6875 * 5) / (8.5 + 1.6875), (1.6875 * 3 + 4 * 1) / (1.6875 + 4)]
    np.testing.assert_allclose(merged(floor=0.5).params["scale"], floored, rtol=1e-5)
    weighted = [(3 * 8.5 * 1 + 1 * 5) / 26.5, 1]
    np.testing.assert_allclose(merged(weights={"a": 3.0, "b": 1.0}).params["scale"], weighted, rtol=1e-5)


def test_equal_fishers_average_and_an_expert_without_any_is_ignored():
    rng = np.random.default_rng(0)
    base, a, b = (random_params(rng, (5, 4)) for _ in range(3))
    same = jax.tree.map(lambda leaf: np.stack([np.abs(leaf) ** 8 + 1e-3] * 2), base)
    experts = {"a": a, "b": b}
    average = pivotjax.merge(None, experts, "average").params
    for normalize in (False, True):
        merged = pivotjax.merge(None, experts, "fisher", calibration=calibration(lambda p: same), normalize=normalize)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), merged.params, average)
        assert merged.report["layers"]["linear_0"]["weights"] == pytest.approx({"a": 0.5, "b": 0.5})

        one = jax.tree.map(lambda leaf: leaf * np.array([1, 0]).reshape(2, *[1] * (leaf.ndim - 1)), same)
        merged = pivotjax.merge(None, experts, "fisher", calibration=calibration(lambda p, one=one: one),
                                normalize=normalize, floor=1e-9)  # fmt: skip
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), merged.params, a)

    nothing = jax.tree.map(np.zeros_like, same)
    merged = pivotjax.merge(None, experts, "fisher", calibration=calibration(lambda p: nothing))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), merged.params, average)


@pytest.mark.parametrize("options", [
    {"normalize": True},
    {"floor": 0.3},
    {"weights": {"emoji": 1.0, "icons": 0.0, "shapes": 2.5}, "normalize": True},
    {"scale": 0.4},
])  # fmt: skip
def test_fisher_agrees_with_the_reference(world, options):
    merged = pivotjax.merge(world.base, world.experts, "fisher", calibration=world.calibration, **options)
    close(merged.params, referenced(world, "fisher", **options))


@pytest.mark.parametrize("options", [
    {"per": "task", "steps": 100},
    {"objective": "entropy", "steps": 100},
    {"init": 0.1, "lr": 0.02, "steps": 60, "scale": 0.5},
])  # fmt: skip
def test_adamerging_agrees_with_the_reference(world, options):
    merged = pivotjax.merge(world.base, world.experts, "adamerging", calibration=world.calibration, **options)
    close(merged.params, referenced(world, "adamerging", **options))


def test_adamerging_in_float64():
    world = make_world(dtype=np.float64, sizes=(7, 6))
    merged = pivotjax.merge(world.base, world.experts, "adamerging", calibration=world.calibration, steps=50)
    assert merged.params["linear_0"]["kernel"].dtype == np.float64
    close(merged.params, referenced(world, "adamerging", steps=50), 1e-8)


def stacked_world(rng):
    """A scanned stack of two layers and a norm; W0 and two experts."""
    like = {"block": {"kernel": np.zeros((2, 4, 5)), "bias": np.zeros((2, 5))}, "norm": {"scale": np.zeros(5)}}
    return [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like) for _ in range(3)]


@pytest.mark.parametrize("per", ["layer", "task"])
def test_adamerging_finds_the_optimum_of_a_quadratic(per):
    """Loss: squared distance to a merge with known coefficients, one for each layer of a stack and for the norm."""
    base, a, b = stacked_world(np.random.default_rng(3))
    planted = {"block[0]": (0.9, -0.2), "block[1]": (0.1, 0.5), "norm": (0.4, 0.7)}
    if per == "task":
        planted = dict.fromkeys(planted, (0.6, 0.1))

    def target(path, w, x, y):
        rows = [planted["block[0]"], planted["block[1]"]] if path[0].key == "block" else [planted["norm"]]
        p, q = np.array(rows, np.float32).T.reshape(2, -1, *[1] * (w.ndim - 1))
        return w + p * (x - w) + q * (y - w)

    goal = jax.tree_util.tree_map_with_path(target, base, a, b)

    def distance(params):
        return sum(jnp.sum((p - g) ** 2) for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(goal)))

    slopes = jax.jit(jax.vmap(jax.value_and_grad(distance)))
    data = calibration(gradient=lambda stacked, objective: slopes(stacked))
    merged = pivotjax.merge(base, {"a": a, "b": b}, "adamerging", calibration=data, lr=0.02, steps=400, per=per)
    found = merged.report["layers"]
    for label, (p, q) in planted.items():
        assert found["norm/scale" if label == "norm" else label]["lambdas"] == pytest.approx({"a": p, "b": q}, abs=2e-3)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-2), merged.params, goal)
    losses = merged.report["facts"]["losses"]
    assert len(losses) == 400 and losses[-1] < 1e-3 < losses[0]
    assert json.loads(json.dumps(merged.report, allow_nan=False)) == merged.report


@pytest.mark.parametrize("name, options", [
    ("fisher", {"normalize": True}),
    ("adamerging", {"steps": 30, "lr": 0.02}),
    ("adamerging", {"steps": 30, "lr": 0.02, "per": "task"}),
    ("regmean", {}),
])  # fmt: skip
def test_calibrated_methods_are_traceable(world, name, options):
    merged = partial(pivotjax.merge, method=name, calibration=world.calibration, **options)
    here = merged(world.base, world.experts)
    there = jax.jit(lambda base, experts: merged(base, experts)._asdict()["params"])(world.base, world.experts)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), here.params, there)


def test_the_report_of_a_traced_adamerging_holds_its_losses(world):
    options = {"calibration": world.calibration, "steps": 30}
    here = pivotjax.merge(world.base, world.experts, "adamerging", **options).report["facts"]
    there = jax.jit(
        lambda b, e: pivotjax.merge(b, e, "adamerging", **options).report["facts"]["losses"]
    )(world.base, world.experts)
    np.testing.assert_allclose(there, here["losses"], rtol=1e-5)


def test_agreement_knows_what_does_not_matter():
    """Cosine: 1 for equal vectors, blind to their lengths. CKA: 1 for one set of vectors rotated, scaled and moved."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(40, 6)).astype(np.float32)
    lengths = rng.uniform(0.1, 5, (40, 1)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    assert float(agreement(x, lengths * x, "cosine")) == pytest.approx(1, abs=1e-6)
    assert float(agreement(x, -x, "cosine")) == pytest.approx(-1, abs=1e-6)
    assert float(agreement(x, 3 * x @ rotation + 7, "cka")) == pytest.approx(1, abs=1e-5)
    for measure in ("cosine", "cka"):
        want = reference.agreement(x.astype(np.float64), y.astype(np.float64), measure)
        assert float(agreement(x, y, measure)) == pytest.approx(want, abs=1e-6)
        assert abs(want) < 0.5
        assert float(agreement(0 * x, y, measure)) == 0  # not NaN


def test_alignment_pools_the_pairs_of_all_domains(world):
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *world.experts.values())
    for measure in ("cosine", "cka"):
        want = [reference.alignment(flat(e), world.features, world.captions, measure) for e in world.experts.values()]
        np.testing.assert_allclose(world.calibration.alignment(stacked, measure), want, atol=1e-5)


class Counted:
    """Features that are read one at a time, as from a file."""

    def __init__(self, items):
        self.items, self.reads = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.items[index]


def test_large_features_are_read_in_blocks_of_the_memory_allowed(world):
    """Images of 3 and 2 tokens, unequal numbers of them: block after block gives what all at once gives."""
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(n, v, 7)).astype(np.float32) for n, v in ((11, 3), (20, 2), (6, 3))]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *world.experts.values())
    whole = FeatureCalibration(layer_inputs, images)
    memory = 3 * 7 * 4 * 8  # 8 rows of each expert
    lazy = [Counted(own) for own in images]
    blocks = FeatureCalibration(layer_inputs, lazy, chunk=5, memory=memory)
    for own in lazy:
        own.reads.clear()
    sizes = [rows.shape for rows, _ in blocks._rows.blocks()]
    assert sizes == [(3, 2, 5, 7)] * 6  # 2 images of 3 tokens: ceil(11 / 2)
    for own in lazy:
        assert own.reads == list(range(len(own)))
    pair = (stacked, world.base, "linear_1")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), whole.grams(stacked), blocks.grams(stacked))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                 whole.cross_grams(*pair), blocks.cross_grams(*pair))  # fmt: skip

    kept = [Counted(own) for own in images]
    calibration = FeatureCalibration(layer_inputs, kept)
    for own in kept:
        own.reads.clear()
    calibration.grams(stacked)
    assert not any(own.reads for own in kept)


def broken(leaf, value):
    return np.where(np.arange(leaf.size).reshape(leaf.shape) == 0, value, leaf)


def test_calibrations_that_cannot_be_used(world):
    def refused(name, data, **options):
        with pytest.raises(InputError) as error:
            pivotjax.merge(world.base, world.experts, name, calibration=data, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    silent = FeatureCalibration(layer_inputs, world.features)
    assert "no captions" in refused("fisher", silent) and "Fisher" in refused("fisher", silent)
    assert "no captions" in refused("adamerging", silent) and "gradient" in refused("adamerging", silent)
    with pytest.raises(InputError, match="no captions"):
        silent.alignment(world.base, "cosine")
    with pytest.raises(InputError, match="no captions"):
        silent.loss(world.base)
    assert "2 experts, but 3" in refused("fisher", calibration(lambda p: p))
    assert "3 experts, but" not in refused("fisher", calibration(lambda p: jax.tree.map(lambda a: a[:2], p), count=3))
    assert "leading axis of 3" in refused("fisher", calibration(lambda p: p["linear_0"], count=3))
    nan = calibration(lambda p: jax.tree.map(lambda leaf: broken(leaf, np.nan), p), count=3)
    assert "not finite" in refused("fisher", nan)
    lost = calibration(gradient=lambda p, objective: (jnp.array([jnp.nan]), p))
    assert "not finite at step 0" in refused("adamerging", lost)
    flat_loss = calibration(gradient=lambda p, objective: (jnp.ones(1), jax.tree.map(lambda a: a[0], p)))
    assert "leading axis of 1" in refused("adamerging", flat_loss)
    with pytest.raises(InputError, match="give one, or leave scale at 1"):
        pivotjax.merge(None, world.experts, "fisher", calibration=world.calibration, scale=0.5)
    for weights, words in ((-1.0, "at least 0"), (0.0, "all values are 0")):
        given = dict.fromkeys(world.experts, weights)
        assert words in refused("fisher", world.calibration, weights=given)
    with pytest.raises(InputError, match="'objective'"):
        pivotjax.merge(world.base, world.experts, "adamerging", calibration=world.calibration, objective="captions")
