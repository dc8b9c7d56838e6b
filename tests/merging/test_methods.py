"""The baselines on examples with known answers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_world import layer_inputs, make_world, matrices, numpy_inputs

import pivotjax
from pivotjax.merging.calibration import FeatureCalibration


def one_leaf(*values, dtype=np.float32):
    return [{"scale": np.array(v, dtype)} for v in values]


def test_ties_by_hand():
    """Density .5 keeps 2 of 4; signs are elected by the sum; agreeing entries are averaged."""
    base = {"scale": np.zeros(4, np.float32)}
    experts = one_leaf([4, -3, 0.1, 0.2], [0.3, 2, -5, 0.1], [6, 0.5, 0.4, 7])
    # trimmed: [4, -3, 0, 0], [0, 2, -5, 0], [6, 0, 0, 7]; signs: +, -, -, +
    merged = pivotjax.merge(base, experts, "ties", density=0.5).params["scale"]
    np.testing.assert_allclose(merged, [5, -3, -5, 7])


def test_ties_takes_densities_and_weights_by_expert():
    base = {"scale": np.zeros(4, np.float32)}
    experts = dict(zip("ab", one_leaf([4, -3, 0.1, 0.2], [0.3, 2, -5, 0.1])))
    options = {"density": {"a": 1.0, "b": 0.25}, "weights": {"a": 3.0, "b": 1.0}}
    # trimmed and weighted: [12, -9, .3, .6], [0, 0, -5, 0]
    mean = pivotjax.merge(base, experts, "ties", **options).params["scale"]
    np.testing.assert_allclose(mean, [4, -3, -5, 0.2], rtol=1e-6)
    total = pivotjax.merge(base, experts, "ties", normalize=False, **options).params["scale"]
    np.testing.assert_allclose(total, [12, -9, -5, 0.6], rtol=1e-6)


def test_weighted_average_and_task_arithmetic():
    base, experts = {"scale": np.ones(2, np.float32)}, dict(zip("ab", one_leaf([2, 3], [5, 1])))
    weights = {"a": 1, "b": 3}
    np.testing.assert_allclose(pivotjax.merge(None, experts, "average", weights=weights).params["scale"], [4.25, 1.5])
    summed = pivotjax.merge(base, experts, "task_arithmetic", weights=weights, **{"lambda": 0.5}).params["scale"]
    np.testing.assert_allclose(summed, [1 + 0.5 * (1 + 12), 1 + 0.5 * 2])


def test_regmean_recovers_least_squares():
    """Experts fitted on slices of data from one linear map with noise: rho 1 gives the fit to all data at once."""
    rng = np.random.default_rng(0)
    truth, fits, slices, targets = rng.normal(size=(5, 9)), {}, [], []
    for k in range(3):
        x = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 8)) * 0.4 + rng.normal(size=8)
        inputs = np.hstack([x, np.ones((60, 1))])
        y = inputs @ truth.T + 0.3 * rng.normal(size=(60, 5))
        fit = np.linalg.lstsq(inputs, y, rcond=None)[0]
        fits[f"slice {k}"] = {"linear_0": {"kernel": fit[:8].astype(np.float32), "bias": fit[8].astype(np.float32)}}
        slices.append(x.astype(np.float32))
        targets.append(y)
    calibration = FeatureCalibration(layer_inputs, slices)
    everything = np.hstack([np.concatenate(slices), np.ones((180, 1))])
    best = np.linalg.lstsq(everything, np.concatenate(targets), rcond=None)[0]
    ones = {"linear_0": {"kernel": np.ones((8, 5), np.float32), "bias": np.ones(5, np.float32)}}
    for base, on in ((None, "weights"), (ones, "updates")):
        merged = pivotjax.merge(base, fits, "regmean", calibration=calibration, rho=1.0, on=on).params
        np.testing.assert_allclose(matrices(merged)["linear_0"], best.T, atol=2e-3)


def test_inputs_that_no_expert_saw_are_averaged():
    """A dead hidden unit leaves a singular Gram matrix; its column is the experts' mean, not NaN."""
    world = make_world(sizes=(6, 5))
    for own in world.features:
        own[:, 2] = 0
    plain = {"rescale": "none"}
    for name, options in (("regmean", {"rho": 1.0}), ("pivot", plain | {"gram": "own"}), ("pivot", plain)):
        merged = pivotjax.merge(world.base, world.experts, name, calibration=world.calibration, **options).params
        mean = np.mean([e["linear_0"]["kernel"][2] for e in world.experts.values()], axis=0)
        np.testing.assert_allclose(merged["linear_0"]["kernel"][2], mean, atol=1e-5)


def test_half_precision_accumulates_in_float32():
    """256 bfloat16 experts: a bfloat16 running sum would stall; the float32 mean is exact to bfloat16's rounding."""
    experts = [{"scale": jnp.full(3, 1 + k % 2 / 128, jnp.bfloat16)} for k in range(256)]
    merged = pivotjax.merge(None, experts, "average").params["scale"]
    assert merged.dtype == jnp.bfloat16
    expected = np.float32(1 + 1 / 256).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(merged), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes_and_array_kinds_are_kept(dtype):
    base, expert = one_leaf([1, 2], [3, 4], dtype=dtype)
    merged = pivotjax.merge(base, [expert], "task_arithmetic", scale=1.0).params["scale"]
    assert isinstance(merged, np.ndarray) and merged.dtype == dtype
    np.testing.assert_array_equal(merged.astype(np.float32), [3, 4])


@pytest.mark.parametrize("layout", ["flax", "torch", "torch flat"])
def test_layouts_agree(layout):
    """The same projector as Flax kernels, as nested torch weights and as a flat state dict gives the same merge."""
    world = make_world(sizes=(6, 5, 5))

    def convert(params):
        if layout == "flax":
            return params
        turned = {name: {"weight": p["kernel"].T, "bias": p["bias"]} for name, p in params.items()}
        if layout == "torch":
            return turned
        return {f"mm_projector.{name[-1]}.{leaf}": value for name, p in turned.items() for leaf, value in p.items()}

    want = convert(pivotjax.merge(world.base, world.experts, "pivot").params)
    experts = {name: convert(expert) for name, expert in world.experts.items()}
    got = pivotjax.merge(convert(world.base), experts, "pivot")
    assert len(got.report["layers"]) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, got.params)


def test_scanned_layers_are_merged_one_by_one():
    """A stack `[depth, d_in, d_out]` gives what its layers give alone; its norm (no layer) is averaged."""
    world = make_world(sizes=(6, 6, 6, 6))

    def stacked(params):
        layers = [params[f"linear_{i}"] for i in range(3)]
        block = {leaf: np.stack([layer[leaf] for layer in layers]) for leaf in ("kernel", "bias")}
        return {"block": block, "norm": {"scale": params["linear_0"]["bias"]}}

    alone = pivotjax.merge(world.base, world.experts, "pivot", basis="cross", rank=2)
    experts = {name: stacked(expert) for name, expert in world.experts.items()}
    together = pivotjax.merge(stacked(world.base), experts, "pivot", basis="cross", rank=2)
    for i in range(3):
        one, all_three = alone.params[f"linear_{i}"]["kernel"], together.params["block"]["kernel"][i]
        np.testing.assert_allclose(all_three, one, atol=1e-6)
        assert together.report["layers"][f"block[{i}]"]["rank"] == 2
    mean = np.mean([e["linear_0"]["bias"] for e in world.experts.values()], axis=0)
    np.testing.assert_allclose(together.params["norm"]["scale"], mean, atol=1e-6)


def test_gram_matrices_of_features(world):
    """FeatureCalibration against NumPy float64: own and student Gram matrices, cross moment; 1e-5 of the largest."""
    stacked = {n: {leaf: np.stack([e[n][leaf] for e in world.experts.values()]) for leaf in ("kernel", "bias")}
               for n in world.base}
    grams = world.calibration.grams(stacked)
    student, cross = world.calibration.cross_grams(stacked, world.base, "linear_1")
    for k, (expert, x) in enumerate(zip(world.experts.values(), world.features)):
        taught = numpy_inputs(matrices(expert), x.astype(np.float64))
        learnt = numpy_inputs(matrices(world.base), x.astype(np.float64))["linear_1"]
        for layer, inputs in taught.items():
            close(grams[layer][k], inputs.T @ inputs / len(x))
        close(student[k], learnt.T @ learnt / len(x))
        close(cross[k], taught["linear_1"].T @ learnt / len(x))


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
