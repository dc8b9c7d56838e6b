"""Methods that work entry by entry, and those on the sphere: examples by hand, options against the NumPy float64
references, random masks, special cases."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_elementwise import REFERENCES as ELEMENTWISE
from reference_elementwise import keep_probabilities, uniform
from reference_spherical import REFERENCES as SPHERICAL
from small_world import flat, make_world

import pivotjax
from pivotjax import InputError
from pivotjax.merging import Stacked, randomness
from pivotjax.merging.elementwise import largest

REFERENCES = ELEMENTWISE | SPHERICAL
PAIRS = ("slerp", "nuslerp")


def merge_vectors(method, *vectors, base=None, **options):
    """One tensor, experts `a`, `b`, ...: the merged tensor; the base is 0 unless it is given."""
    trees = {name: {"scale": np.array(v, np.float32)} for name, v in zip("abcdef", vectors)}
    base = np.zeros_like(trees["a"]["scale"]) if base is None else np.array(base, np.float32)
    return np.asarray(pivotjax.merge({"scale": base}, trees, method, **options).params["scale"])


def merge_matrices(method, *matrices, **options):
    """One layer `[d_out, d_in]` without bias on a base of 0."""
    trees = {name: {"weight": np.array(m, np.float32)} for name, m in zip("abcdef", matrices)}
    base = {"weight": np.zeros_like(trees["a"]["weight"])}
    return pivotjax.merge(base, trees, method, **options)


# By hand


def test_breadcrumbs():
    """Of 5 entries one outlier and two small ones go: [., 3, 2, ., .]."""
    options = {"density": 0.4, "gamma": 0.2, "scale": 1.0}
    merged = merge_vectors("breadcrumbs", [9, 3, -2, 1, 0.5], [1, -2, 3, 8, -4], **options)
    np.testing.assert_allclose(merged, [0, 3, -2 + 3, 0, -4])
    merged = merge_vectors("breadcrumbs_ties", [9, 3, -2, 1, 0.5], [1, -2, 3, 8, -4], **options)
    np.testing.assert_allclose(merged, [0, 3, 3, 0, -4])
    # density and gamma exceed 1 together: only one entry is dropped, the largest
    np.testing.assert_allclose(merge_vectors("breadcrumbs", [9, 3, 2, 1, -5], density=0.8, gamma=0.6, scale=1.0),
                               [0, 3, 2, 1, -5])
    restored = merge_vectors("breadcrumbs", [9, 3, -2, 1, 0.5], **options, rescale="norm")
    np.testing.assert_allclose(restored, np.array([0, 3, -2, 0, 0]) * 15.5 / 5, rtol=1e-6)


def test_trimmed_tensors_get_their_norm_back():
    merged = merge_vectors("ties", [4, -3, 2, 1], density=0.5, rescale="norm")
    np.testing.assert_allclose(merged, np.array([4, -3, 0, 0]) * 10 / 7, rtol=1e-6)


def test_sce():
    """Variances 4, 9, 0, 1: two of the three entries that vary are kept, and each has one expert that agrees."""
    merged = merge_vectors("sce", [4, 0, 5, 1], [0, 6, 5, 3], select=0.7)  # int(.7 x 3 entries that vary) = 2
    np.testing.assert_allclose(merged, [4, 6, 0, 0], rtol=1e-6)
    # all entries: energies 42 and 70, weights .375 and .625; the sign of the sum wins
    merged = merge_vectors("sce", [4, 1, 5, 0], [0, -6, 5, 3], select=1.0)
    np.testing.assert_allclose(merged, [4, -6, 5, 3], rtol=1e-6)
    merged = merge_vectors("sce", [3, 0], [1, 0], select=1.0)
    np.testing.assert_allclose(merged, [0.9 * 3 + 0.1 * 1, 0], rtol=1e-6)
    np.testing.assert_allclose(merge_vectors("sce", [3, 0], [1, 0], select=1.0, floor=10.0), [2, 0], rtol=1e-6)


def test_model_stock():
    """Cosine .6 of two updates: t = 1.2 / 1.6 = .75. Filter-wise: cosines 1 and 0, t = 1 and 0."""
    np.testing.assert_allclose(merge_vectors("model_stock", [5, 0], [3, 4]), 0.75 * np.array([4, 2]), rtol=1e-6)
    merged = merge_matrices("model_stock", [[1, 0], [1, 0]], [[3, 0], [0, 3]], filter_wise=True)
    np.testing.assert_allclose(merged.params["weight"], [[2, 0], [0, 0]], atol=1e-7)
    assert merged.report["layers"]["weight"]["interpolation"] == pytest.approx(0.5)


def test_slerp():
    """Half way between 2 e1 and 2 e2, and one third of the way."""
    np.testing.assert_allclose(merge_vectors("slerp", [2, 0], [0, 2]), [2**0.5, 2**0.5], rtol=1e-6)
    np.testing.assert_allclose(merge_vectors("slerp", [2, 0], [0, 2], t=1 / 3), [3**0.5, 1], rtol=1e-6)
    # weights and updates differ: on updates the angle is a right one, on weights it is not
    on_updates = merge_vectors("slerp", [3, 1], [1, 3], base=[1, 1], on="updates")
    np.testing.assert_allclose(on_updates, [1 + 2**0.5, 1 + 2**0.5], rtol=1e-6)
    angle = np.arccos(0.6)
    on_weights = np.array([4, 4]) * np.sin(angle / 2) / np.sin(angle)
    np.testing.assert_allclose(merge_vectors("slerp", [3, 1], [1, 3], base=[1, 1]), on_weights, rtol=1e-6)


def test_nuslerp():
    weights = {"a": 2.0, "b": 1.0}
    np.testing.assert_allclose(merge_vectors("nuslerp", [2, 0], [0, 2], weights=weights), [3**0.5, 1], rtol=1e-6)
    first, second = [[1, 0], [0, 2]], [[0, 1], [0, 4]]  # rows: a right angle, parallel
    merged = merge_matrices("nuslerp", first, second, along="outputs").params["weight"]
    np.testing.assert_allclose(merged, [[0.5**0.5, 0.5**0.5], [0, 3]], rtol=1e-6, atol=1e-7)
    merged = merge_matrices("nuslerp", np.transpose(first), np.transpose(second), along="inputs").params["weight"]
    np.testing.assert_allclose(merged.T, [[0.5**0.5, 0.5**0.5], [0, 3]], rtol=1e-6, atol=1e-7)


def test_means_on_the_sphere():
    """Three orthogonal vectors of lengths 1, 2, 6: the direction is the diagonal, the length 3, whichever the mean."""
    vectors = np.diag([1.0, 2.0, 6.0])
    for method in ("multislerp", "karcher"):
        np.testing.assert_allclose(merge_vectors(method, *vectors), [3**0.5] * 3, rtol=1e-5)
    # two vectors: the mean lies on the arc, w_2 of the way (Karcher) or along the chord of the units (multislerp)
    weights = {"a": 2.0, "b": 1.0}
    np.testing.assert_allclose(merge_vectors("karcher", [1, 0], [0, 1], weights=weights), [0.75**0.5, 0.5], rtol=1e-5)
    chord = np.array([2, 1]) / 5**0.5
    np.testing.assert_allclose(merge_vectors("multislerp", [1, 0], [0, 1], weights=weights), chord, rtol=1e-6)
    summed = merge_vectors("multislerp", [1, 0], [0, 1], weights=weights, normalize=False)
    np.testing.assert_allclose(summed, 3 * chord, rtol=1e-6)


def test_metagpt():
    """Energies 1 + 4 and 0 + 20 over the model: weights .2 and .8; tensor by tensor 1, 0 and 1/6, 5/6."""
    base = {name: np.zeros(2, np.float32) for name in ("first", "second")}
    a = {"first": np.float32([1, 0]), "second": np.float32([0, 2])}
    b = {"first": np.float32([0, 0]), "second": np.float32([2, 4])}
    merged = pivotjax.merge(base, [a, b], "metagpt").params
    np.testing.assert_allclose(merged["first"], [0.2, 0], rtol=1e-6)
    np.testing.assert_allclose(merged["second"], [1.6, 0.4 + 3.2], rtol=1e-6)
    merged = pivotjax.merge(base, [a, b], "metagpt", over="tensor").params
    np.testing.assert_allclose(merged["first"], [1, 0], rtol=1e-6)
    np.testing.assert_allclose(merged["second"], [2 * 5 / 6, 2 / 6 + 4 * 5 / 6], rtol=1e-6)


def test_lines():
    """Three blocks, an embedding before and a norm after: 1/2, 1/2 + b/2, 1/2 + b; outside of blocks 1/2."""
    names = ("blocks.2.w", "blocks.5.w", "blocks.10.w", "embed", "norm")
    base = {name: np.zeros(1, np.float32) for name in names}
    experts = [{name: np.float32([1]) for name in names}, {name: np.float32([3]) for name in names}]
    merged = pivotjax.merge(base, experts, "lines", beta=0.4).params
    np.testing.assert_allclose([merged[name][0] / 4 for name in names], [0.5, 0.7, 0.9, 0.5, 0.5], rtol=1e-6)
    one = {"blocks.2.w": base["embed"]}
    alone = pivotjax.merge(one, [{"blocks.2.w": np.float32([1])}] * 2, "lines", beta=0.4).params
    np.testing.assert_allclose(alone["blocks.2.w"], [1], rtol=1e-6)
    # weights of 1 and 0: |sum|_1 / |merged|_1 = 4 / 1
    first = pivotjax.merge(base, dict(zip("ab", experts)), "lines", beta=0.0, weights={"a": 1.0, "b": 0.0}).params
    np.testing.assert_allclose(first["norm"], [4 / 1 / 2 * 1], rtol=1e-6)


# Options against the references

WEIGHTS = {"emoji": 0.5, "icons": 2.0, "shapes": 1.0}
TWO = {"emoji": 0.5, "icons": 2.0}
OPTIONS = [
    *[(name, options) for name in ("dare_linear", "dare_ties") for options in (
        {"density": 0.3, "rescale": "norm", "seed": 7},
        {"density": {"emoji": 0.1, "icons": 0.5, "shapes": 1.0}, "rescale": "none", "weights": WEIGHTS, "scale": 0.8},
        {"normalize": True, "weights": {"emoji": -0.5, "icons": 2.0, "shapes": 1.0}},
        {"normalize": False, "weights": WEIGHTS},
    )],
    *[(name, options) for name in ("della_linear", "della") for options in (
        {"density": 0.4, "epsilon": 0.3, "rescale": "norm", "seed": 3},
        {"density": {"emoji": 0.1, "icons": 0.5, "shapes": 1.0}, "epsilon": {"emoji": 0.05, "icons": 0.2, "shapes": 0}},
        {"rescale": "none", "epsilon": 0.0, "weights": WEIGHTS, "normalize": True, "scale": 0.8},
        {"normalize": False, "weights": WEIGHTS},
    )],
    *[(name, options) for name in ("breadcrumbs", "breadcrumbs_ties") for options in (
        {"density": 0.5, "gamma": 0.2, "weights": WEIGHTS, "rescale": "norm"},
        {"density": {"emoji": 0.3, "icons": 0.9, "shapes": 1.0}, "gamma": {"emoji": 0.3, "icons": 0.3, "shapes": 0.3}},
        {"density": 0.7, "gamma": 0.0, "normalize": True, "scale": 0.8},
        {"normalize": False, "density": 0.1},
    )],
    ("sce", {"select": 0.5, "scale": 0.7}), ("sce", {"select": 1.0}), ("sce", {"select": 0.3, "floor": 1e3}),
    ("metagpt", {"over": "tensor", "scale": 0.5}),
    ("lines", {"alpha": 0.2, "beta": 1.0}), ("lines", {"weights": WEIGHTS, "scale": 0.6}),
    ("slerp", {"t": 0.2}), ("slerp", {"on": "updates", "t": 0.9, "scale": 0.5}),
    ("nuslerp", {"weights": TWO, "along": "outputs"}), ("nuslerp", {"weights": TWO, "along": "inputs", "scale": 0.5}),
    ("multislerp", {"weights": WEIGHTS}), ("multislerp", {"weights": WEIGHTS, "normalize": False}),
    ("karcher", {"weights": WEIGHTS}), ("karcher", {"on": "updates", "iterations": 2, "weights": WEIGHTS}),
    ("karcher", {"on": "updates", "tolerance": 0.05, "scale": 0.5}),
    ("model_stock", {"filter_wise": True}), ("model_stock", {"floor": 50.0, "scale": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-9), (np.float32, 2e-5)])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_options_follow_the_formulas(name, options, dtype, tolerance):
    world = make_world(count=2 if name in PAIRS else 3, sizes=(7, 6, 5), dtype=dtype)
    got = flat(pivotjax.merge(world.base, world.experts, name, **options).params)
    want = REFERENCES[name](flat(world.base), {n: flat(e) for n, e in world.experts.items()}, **options)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_bfloat16_experts_are_merged_in_float32(name):
    """The merge of bfloat16 experts is that of the same values in float32, rounded once, bit by bit; and follows the
    reference (but where a method drops one of two equal magnitudes, which are many in bfloat16: then which is a
    matter of convention)."""
    world = make_world(count=2 if name in PAIRS else 3, sizes=(7, 6, 5))
    base, *experts = (jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tree)
                      for tree in (world.base, *world.experts.values()))
    experts = dict(zip(world.experts, experts))
    merged = pivotjax.merge(base, experts, name).params
    wide = [jax.tree.map(lambda x: x.astype(np.float32), tree) for tree in (base, experts)]
    same = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), pivotjax.merge(*wide, name).params)
    jax.tree.map(np.testing.assert_array_equal, merged, same)
    if name in ("breadcrumbs", "breadcrumbs_ties", "sce"):
        return
    want = REFERENCES[name](flat(base), {n: flat(e) for n, e in experts.items()})
    for path, leaf in flat(merged).items():
        np.testing.assert_allclose(leaf, want[path], rtol=2**-8, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_inside_a_larger_program_and_from_a_stack(name):
    """Traced, and with the experts along a leading axis: the same numbers."""
    world = make_world(count=2 if name in PAIRS else 3, sizes=(7, 6, 5))
    plain = pivotjax.merge(world.base, world.experts, name).params
    stacked = Stacked(jax.tree.map(lambda *x: jnp.stack(x), *world.experts.values()), list(world.experts))
    for experts in (world.experts, stacked):
        traced = jax.jit(lambda base, params, experts=experts: pivotjax.merge(
            base, Stacked(params, experts.names) if experts is stacked else params, name).params)
        got = traced(world.base, experts.params if experts is stacked else experts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, plain)


# Order statistics

VALUES = {
    "normal": np.abs(np.random.default_rng(0).normal(size=(300, 1000))),
    "few": np.array([0.5, 3.0, 2.0]),
    "equal": np.full(2000, 3.0),
    "zeros": np.zeros(1500),
    "sparse": np.where(np.arange(5000) % 7, 0, np.arange(5000) / 9),
    "tiny and huge": np.float64(10) ** np.linspace(-44, 38, 4321),
    "rounded": np.round(np.abs(np.random.default_rng(1).normal(size=9999)), 1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VALUES)
def test_largest_is_exact(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        values = VALUES[name].astype(dtype)
        ordered = np.sort(values.ravel())[::-1]
        find = jax.jit(largest)
        for count in {1, 2, 3, values.size // 2, values.size}:
            assert find(values, count) == ordered[count - 1]
        assert find(values, 0) == np.inf


# Randomness


def draw(seed=0, name="emoji", path="linear_0/kernel", shape=(64, 64)):
    return np.asarray(randomness.uniform(jnp.asarray(randomness.keys(seed, [name], path))[0], shape))


def test_draws_are_what_the_description_says():
    np.testing.assert_array_equal(draw(shape=(7, 5)), uniform(0, "emoji", "linear_0/kernel", (7, 5)))
    assert np.array_equal(draw(shape=(35,)), draw(shape=(7, 5)).ravel())


def test_draws_are_uniform_and_unrelated():
    """A million draws: a chi-square test of 256 bins and of 64 x 64 cells of neighbours; correlations with the draws of
    other names, paths and seeds and of shifted entries below 5 standard errors."""
    shape, size = (1024, 1024), 2**20
    draws = draw(shape=shape)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=256, range=(0, 1))[0]
    assert np.sum((counts - size / 256) ** 2) / (size / 256) < 255 + 5 * np.sqrt(2 * 255)
    cells = np.histogram2d(draws.ravel()[:-1], draws.ravel()[1:], bins=64, range=[[0, 1]] * 2)[0]
    assert np.sum((cells - size / 4096) ** 2) / (size / 4096) < 4095 + 5 * np.sqrt(2 * 4095)
    others = [draw(name="icons", shape=shape), draw(path="linear_1/kernel", shape=shape), draw(seed=1, shape=shape),
              np.roll(draws, 1, 1), np.roll(draws, 1, 0), np.roll(draws, 16, 1)]  # fmt: skip
    for other in others:
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(size)


def zeros_and_ones(method, world, **options):
    """Where one expert's update of 1 everywhere survives."""
    base = {name: {leaf: np.zeros_like(value) for leaf, value in layer.items()} for name, layer in world.base.items()}
    ones = jax.tree.map(np.ones_like, base)
    return pivotjax.merge(base, {"emoji": ones}, method, scale=1.0, **options).params


def test_masks_do_not_depend_on_who_else_is_merged():
    """An expert's mask follows its name and the tensor's: alone, in company, in any order, with options by tensor."""
    world = make_world()
    alone = zeros_and_ones("dare_linear", world)
    base = jax.tree.map(np.zeros_like, world.base)
    ones = {"emoji": jax.tree.map(np.ones_like, base)}
    company = {"icons": base} | ones | {"shapes": base}
    options = {"density": [{"filter": "linear_1", "value": 0.5}, {"value": 0.500001}], "scale": 1.0}
    together = pivotjax.merge(base, company, "dare_linear", **options).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, together)
    other = pivotjax.merge(base, {"icons": ones["emoji"]}, "dare_linear", scale=1.0).params
    again = zeros_and_ones("dare_linear", world, seed=1)
    for changed in (other, again):
        assert not np.array_equal(alone["linear_0"]["kernel"], changed["linear_0"]["kernel"])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share(density):
    """65,536 entries of 1: the share kept lies within 5 standard errors of the density; what is kept is 1 / density."""
    size = 2**16
    merged = merge_vectors("dare_linear", np.ones(size), density=density, scale=1.0)
    assert set(np.unique(merged)) == {0, np.float32(1 / density)}
    assert abs(np.mean(merged > 0) - density) < 5 * np.sqrt(density * (1 - density) / size)


def test_dare_expects_task_arithmetic():
    """The mean over 400 seeds lies within 5 standard errors of the undropped merge, entry by entry."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 50))
    draws = np.stack([merge_vectors("dare_linear", *vectors, seed=s, density=0.4, scale=1.0) for s in range(400)])
    error = np.sqrt(np.sum(vectors**2, 0) * (1 / 0.4 - 1) / len(draws))
    assert np.all(np.abs(draws.mean(0) - vectors.sum(0)) < 5 * error)


def test_della_keeps_by_rank():
    """4,000 rows of 9 shuffled magnitudes: how often each rank survives, within 5 standard errors of its probability;
    what survives is divided by just that."""
    rng = np.random.default_rng(0)
    rows, density, epsilon = 4000, 0.6, 0.3
    matrix = rng.permuted(np.tile(np.arange(1.0, 10), (rows, 1)), axis=1) * rng.choice([-1, 1], size=(rows, 9))
    options = {"density": density, "epsilon": epsilon, "scale": 1.0}
    merged = merge_matrices("della_linear", matrix, **options).params["weight"]
    for rank in range(9):
        probability = density - epsilon + 2 * epsilon * rank / 8
        mine = np.abs(matrix) == rank + 1
        kept = merged[mine] != 0
        assert abs(kept.mean() - probability) < 5 * np.sqrt(max(probability * (1 - probability), 0.01) / rows)
        np.testing.assert_allclose(merged[mine][kept], matrix[mine][kept] / probability, rtol=1e-5)


def test_della_ranks_a_kernel_by_its_outputs():
    """A Flax kernel is ranked along its inputs, as the torch weight it stands for."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 30))
    weight *= np.arange(1, 41)[:, None] ** 2  # ranks along the other axis would be quite different
    kernel = {"kernel": weight.T.astype(np.float32)}
    merged = pivotjax.merge({"kernel": np.zeros((30, 40), np.float32)}, {"a": kernel}, "della_linear",
                            density=0.5, epsilon=0.5, scale=1.0).params["kernel"].T  # fmt: skip
    probability = keep_probabilities(weight, 0.5, 0.5)
    kept = merged != 0
    np.testing.assert_allclose(merged[kept], (weight / np.maximum(probability, 1e-9))[kept], rtol=1e-4)


# Special cases


@pytest.mark.parametrize("method", PAIRS)
def test_pairs_refuse_other_numbers(method):
    for count in (1, 3):
        with pytest.raises(InputError, match=f"two experts, and here are {count}"):
            merge_vectors(method, *np.eye(3)[:count])


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_without_a_base_weights_are_merged_and_cannot_be_scaled(method):
    experts = [{"scale": np.float32(v)} for v in ([2, 0], [0, 2])]
    merged = pivotjax.merge(None, experts, method).params["scale"]
    np.testing.assert_allclose(merged, [2**0.5, 2**0.5], rtol=1e-5)
    with pytest.raises(InputError, match="give a base, or leave scale at 1"):
        pivotjax.merge(None, experts, method, scale=0.5)
    if method in ("slerp", "karcher"):
        with pytest.raises(InputError, match="on='weights'"):
            pivotjax.merge(None, experts, method, on="updates")


def test_parallel_opposite_and_zero_vectors():
    """The rules of the docstrings, in numbers; nothing is NaN."""
    for method in PAIRS:
        np.testing.assert_allclose(merge_vectors(method, [1, 1], [3, 3]), [2, 2], rtol=1e-6)
        np.testing.assert_allclose(merge_vectors(method, [1, 1], [-3, -3]), [-1, -1], rtol=1e-6)
        np.testing.assert_allclose(merge_vectors(method, [0, 0], [0, 2]), [0, 2**0.5], rtol=1e-6)
        np.testing.assert_array_equal(merge_vectors(method, [0, 0], [0, 0]), [0, 0])
    np.testing.assert_allclose(merge_vectors("multislerp", [1, 0], [-3, 0]), [-1, 0])  # directions cancel: linear
    np.testing.assert_allclose(merge_vectors("multislerp", [0, 0], [0, 2]), [0, 1])  # 0 counts in the length only
    np.testing.assert_allclose(merge_vectors("karcher", [1, 0], [-3, 0]), [2, 0], rtol=1e-6)  # the first's direction
    np.testing.assert_allclose(merge_vectors("karcher", [0, 0], [0, 2]), [0, 1], rtol=1e-6)
    np.testing.assert_array_equal(merge_vectors("karcher", [0, 0], [0, 0]), [0, 0])
    np.testing.assert_array_equal(merge_vectors("model_stock", [1, 0], [-1, 0]), [0, 0])  # no finite t: the base
    np.testing.assert_array_equal(merge_vectors("model_stock", [0, 0], [1, 0]), [0, 0])


def test_what_the_report_says_of_exceptions():
    world = make_world()
    biases = {f"linear_{i}/bias" for i in range(3)}
    for method, options in (("della", {}), ("model_stock", {"filter_wise": True})):
        report = pivotjax.merge(world.base, world.experts, method, **options).report
        assert set(report["exceptions"]) == biases
    two = {name: world.experts[name] for name in ("emoji", "icons")}
    assert set(pivotjax.merge(world.base, two, "nuslerp", along="inputs").report["exceptions"]) == biases
    one = {"emoji": world.experts["emoji"]}
    told = pivotjax.merge(world.base, one, "model_stock").report["exceptions"]
    assert len(told) == 6 and all("one expert" in sentence for sentence in told.values())
    for method in ("sce", "metagpt"):
        layers = pivotjax.merge(world.base, world.experts, method).report["layers"]
        for facts in layers.values():
            assert sum(facts["weights"].values()) == pytest.approx(1, abs=1e-5)


def test_densities_of_none_and_all():
    """An expert's density of 0 leaves nothing of it, 1 everything, whatever epsilon and gamma are."""
    density = {"a": 0.0, "b": 1.0}
    for method in ("dare_linear", "della_linear", "breadcrumbs", "ties", "dare_ties", "della", "breadcrumbs_ties"):
        merged = merge_vectors(method, [1, 2, 3], [4, -5, 6], density=density, scale=1.0)
        np.testing.assert_array_equal(merged, [4, -5, 6])


def test_rows_of_one_entry_have_no_rank():
    """Of 10,000 outputs with one input each the density is kept."""
    merged = merge_matrices("della_linear", np.ones((10000, 1)), density=0.6, epsilon=0.3, scale=1.0).params["weight"]
    assert abs(np.mean(merged > 0) - 0.6) < 5 * np.sqrt(0.24 / 10000)


def test_entries_that_do_not_vary_are_not_selected():
    """Identical experts, and one alone, keep nothing below a share of 1."""
    for vectors in ([[1, 2, 3]] * 3, [[1, 2, 3]]):
        np.testing.assert_array_equal(merge_vectors("sce", *vectors, select=0.9), [0, 0, 0])
        np.testing.assert_allclose(merge_vectors("sce", *vectors, select=1.0), [1, 2, 3], rtol=1e-6)
