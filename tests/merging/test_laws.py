"""The laws that methods declare, over the whole registry, and agreement with the NumPy float64 reference.

Tolerances: float32 agrees with the reference within 2e-4 of the largest entry (measured: about 1e-6, more where a
metric is inverted); float64 input without calibration within 1e-9.
"""

import importlib
from pathlib import Path

import jax
import merging_reference as reference
import numpy as np
import pytest
from reference_calibrated import alignment
from small_world import flat, from_flat, make_world, matrices, numpy_inputs

import pivotjax
from pivotjax import InputError
from pivotjax.merging.registry import LAWS, METHODS

CASES = [(name, calibrated) for name, m in METHODS.items() for calibrated in (False, True)
         if m.takes_calibration == calibrated or (m.takes_calibration and "calibration" not in m.needs)]
LAW_CASES = [(name, calibrated, law) for name, calibrated in CASES for law in LAWS]
PAIRS = ("slerp", "nuslerp")  # between exactly two experts


# Every file `reference_*.py` beside this one holds references of one family: `{method: function(base, experts,
# **options)}` over flat float64 dicts `linear_0/weight` [d_out, d_in], `linear_0/bias`.
REFERENCES = {
    name: function
    for file in sorted(Path(__file__).parent.glob("reference_*.py"))
    for name, function in importlib.import_module(file.stem).REFERENCES.items()
}


def run(world, name, calibrated=False, **options):
    extra = {"calibration": world.calibration} if calibrated else {}
    return pivotjax.merge(world.base, world.experts, name, **extra, **options)


def expected(world, name, calibrated=False, **options):
    """The merged `{layer: [W | b]}` by the reference, layer after layer."""
    if name in REFERENCES:
        extra = {"world": world} if calibrated else {}
        experts = {k: flat(e) for k, e in world.experts.items()}
        return matrices(from_flat(REFERENCES[name](flat(world.base), experts, **extra, **options)))
    base, experts = matrices(world.base), [matrices(e) for e in world.experts.values()]
    own = [numpy_inputs(e, x.astype(np.float64)) for e, x in zip(experts, world.features)]
    merged = {}
    for layer in base:
        weights = [e[layer] for e in experts]
        grams = [x[layer].T @ x[layer] / len(x[layer]) for x in own]
        if name == "ties":  # tensor by tensor
            parts = [slice(None, -1), slice(-1, None)]
            pieces = [reference.ties(base[layer][:, p], [w[:, p] for w in weights], **options) for p in parts]
            merged[layer] = np.hstack(pieces)
        elif name == "regmean":
            merged[layer] = reference.regmean(base[layer], weights, grams, **options)
        elif name == "pivot":
            chosen = options | {"scale": 1.0}
            gram = chosen.setdefault("gram", "merged" if calibrated else "updates")
            statistics = {"grams": grams} if gram in ("own", "merged") else {}
            if gram == "merged":
                student = [numpy_inputs(base | merged, x.astype(np.float64))[layer] for x in world.features]
                statistics["student"] = [h.T @ h / len(h) for h in student]
                statistics["cross"] = [x[layer].T @ h / len(h) for x, h in zip(own, student)]
            if chosen.get("scores") == "loss_gain":
                chosen["gains"] = loss_gains(base, experts, layer)
            if chosen.get("scores") == "alignment":
                chosen["gains"] = alignment_gains(world, layer, chosen.pop("measure", "cosine"))
            merged[layer] = reference.pivot(base[layer], weights, **statistics, **chosen)
        else:
            merged[layer] = getattr(reference, name)(base[layer], weights, **options)
    if name == "pivot":  # scaled as a whole, after the layers are solved
        merged = {n: base[n] + options.get("scale", 1.0) * (m - base[n]) for n, m in merged.items()}
    return merged


def loss_gains(base, experts, layer):
    def loss(params):
        return sum(np.mean(m[:, :-1] ** 2) + np.mean(np.abs(m[:, -1])) for m in params.values())

    mean = {n: sum(e[n] for e in experts) / len(experts) for n in base}
    return np.array([loss(mean) - loss(mean | {layer: e[layer]}) for e in experts])


def alignment_gains(world, layer, measure):
    experts = [flat(e) for e in world.experts.values()]
    mean = {path: sum(e[path] for e in experts) / len(experts) for path in experts[0]}

    def gain(expert):
        swapped = mean | {path: leaf for path, leaf in expert.items() if path.startswith(f"{layer}/")}
        return alignment(swapped, world.features, world.captions, measure) - plain

    plain = alignment(mean, world.features, world.captions, measure)
    return np.array([gain(e) for e in experts])


def assert_close(params, want, tolerance=2e-4):
    got = matrices(params)
    for layer, matrix in want.items():
        np.testing.assert_allclose(got[layer], matrix, rtol=0, atol=tolerance * np.abs(matrix).max(), err_msg=layer)


def differ(a, b):
    return max(np.abs(x - y).max() for x, y in zip(matrices(a).values(), matrices(b).values()))


@pytest.mark.parametrize("name, calibrated, law", LAW_CASES)
def test_law(name, calibrated, law):
    """Where a law is declared it holds; where it is not, or only at other options, the defaults follow the formula."""
    options = METHODS[name].laws.get(law)
    world = law_world(law, count=2 if name in PAIRS else 3)
    if law == "single" and name in PAIRS:
        with pytest.raises(InputError, match="two experts, and here are 1"):
            run(world, name)
        return
    if options is None or options:
        result = run(world, name, calibrated).params
        assert_close(result, expected(world, name, calibrated))
    if options is not None:
        check = globals()[f"check_{law}"]
        check(world, lambda w: run(w, name, calibrated, **options).params)


def law_world(law, count):
    if law == "identical":
        world = make_world(count)
        first = next(iter(world.experts.values()))
        world.experts = dict.fromkeys(world.experts, first)
        return world
    if law == "single":
        return make_world(count=1)
    if law == "zero":
        world = make_world(count)
        world.experts = dict.fromkeys(world.experts, world.base)
        return world
    # A layer's inputs must not depend on the updates for a rescaling to pass through: one layer.
    return make_world(count, sizes=(7, 6)) if law == "homogeneous" else make_world(count)


def check_identical(world, method):
    assert_close(method(world), matrices(next(iter(world.experts.values()))))


check_single = check_identical


def check_order(world, method):
    here = method(world)
    world.experts = dict(reversed(world.experts.items()))
    world.features = world.features[::-1]
    assert_close(method(world), matrices(here), 1e-5)


def check_homogeneous(world, method):
    here = method(world)
    for name, expert in world.experts.items():
        world.experts[name] = jax.tree.map(lambda b, e: b + 3 * (e - b), world.base, expert)
    base = matrices(world.base)
    assert_close(method(world), {n: base[n] + 3 * (m - base[n]) for n, m in matrices(here).items()}, 1e-4)


def check_zero(world, method):
    assert_close(method(world), matrices(world.base), 1e-6)


def check_idle(world, method):
    here = method(world)
    world.experts = world.experts | {"idle": world.base}
    assert_close(method(world), matrices(here), 1e-5)


def check_average(world, method):
    experts = [matrices(e) for e in world.experts.values()]
    assert_close(method(world), {n: sum(e[n] for e in experts) / len(experts) for n in experts[0]}, 1e-5)


@pytest.mark.parametrize("name, calibrated", CASES)
def test_every_method_can_be_traced(name, calibrated):
    """As part of a jitted program: no method looks at a value. (Values are compared where methods are tested.)"""
    world = make_world(count=2) if name in PAIRS else make_world()
    extra = {"calibration": world.calibration} if calibrated else {}
    options = {"steps": 2} if name == "adamerging" else {}

    def program(base, experts):
        result = pivotjax.merge(base, experts, name, **extra, **options)
        return result.params, result.report["layers"], result.report["facts"]

    params, layers, _ = jax.eval_shape(program, world.base, world.experts)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, world.base)
    assert layers["linear_1"]["cosines"].shape == (len(world.experts),) * 2


def test_every_declared_law_is_known():
    for m in METHODS.values():
        assert set(m.laws) <= set(LAWS)


@pytest.mark.parametrize("name, calibrated", [c for c in CASES if c[0] != "average"])
def test_no_method_is_the_plain_average_in_disguise(name, calibrated):
    """A public merging library's baselines silently fell back to averaging for a year."""
    world = make_world(count=2 if name in PAIRS else 3)
    average = run(world, "average").params
    assert differ(run(world, name, calibrated).params, average) > 0.05


FREE = [
    {"basis": "energy", "rank": 2, "residual": "drop", "rescale": "none"},
    {"basis": "cross", "rank": 3, "residual": "keep"},
    {"basis": "energy", "energy": 0.6, "residual": "keep_mean"},
    {"basis": "energy", "energy": 1.0},
    {"gate": "hard", "basis": "energy", "residual": "drop"},
    {"gate": "soft", "gamma": 2.0},
    {"basis": "energy", "scores": "energy", "rank": 2, "temperature": 0.1},
    {"scores": "pivot_cosine", "temperature": 0.1},
    {"scores": "loss_gain", "temperature": 0.05},
    {"scale": 0.4, "gate": "soft"},
    {"basis": "average", "rank": 2, "conflict": "elect", "residual": "keep_mean"},
    {"basis": "energy", "energy": 1.0, "conflict": "elect", "weights": {"emoji": 3, "icons": 1, "shapes": 1}},
    {"side": "input", "basis": "energy", "rank": 3, "gate": "hard", "residual": "drop"},
    {"side": "input", "rank": 2, "unit": True},
    {"side": "both", "basis": "energy", "rank": 3, "residual": "drop", "conflict": "elect"},
    {"side": "both", "basis": "average", "energy": 0.7, "unit": True, "gate": "soft"},
    {"grain": "coordinate", "gate": "soft", "basis": "energy", "energy": 1.0},
    {"grain": "coordinate", "gate": "hard", "tau": 0.5, "basis": "energy", "rank": 4, "conflict": "none"},
    {"weights": {"emoji": 1, "icons": 2, "shapes": 5}, "basis": "energy", "energy": 1.0, "gate": "soft"},
    {"unit": True, "basis": "energy", "rank": 2, "residual": "keep_mean", "scores": "energy", "temperature": 0.1},
]
CALIBRATED = [
    {"basis": "energy", "rank": 3, "residual": "drop", "scale": 0.4},
    {"residual": "keep_mean", "rho": 0.5, "rescale": "none"},
    {"metric": "own", "basis": "energy", "gate": "soft", "scores": "pivot_cosine", "rank": 3},
    {"scores": "loss_gain", "temperature": 0.05, "rho": 1.0},
    {"side": "input", "rank": 2, "conflict": "elect"},
    {"scores": "alignment", "temperature": 0.05},
    {"scores": "alignment", "measure": "cka", "temperature": 0.05},
    {"side": "both", "rank": 3, "basis": "energy", "gate": "soft", "unit": True, "metric": "own"},
    {"basis": "average", "energy": 1.0, "grain": "coordinate", "gate": "hard", "tau": 0.4},
]


GRAMS = [("none", options) for options in FREE] + [("updates", options) for options in FREE[::2]]
GRAMS += [(gram, options) for gram in ("own", "merged") for options in CALIBRATED]


@pytest.mark.parametrize("gram, options", GRAMS)
def test_pivot_agrees_with_the_reference(gram, options):
    world = make_world(sizes=(6, 6, 6, 6))  # equal shapes: one compilation
    calibrated = gram != "none" or options.get("scores") in ("loss_gain", "alignment")
    result = run(world, "pivot", calibrated, gram=gram, **options)
    tolerance = 2e-3 if options.get("rho") == 1 else 2e-4  # nearly collinear inputs: the fit's small ridge shows
    assert_close(result.params, expected(world, "pivot", calibrated, gram=gram, **options), tolerance)


@pytest.mark.parametrize("name, options", [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.7}),
    ("ties", {"density": 0.5}),
    ("pivot", {"gram": "none", "gate": "soft"}),
])  # fmt: skip
def test_float64_input_is_merged_in_float64(name, options):
    world = make_world(dtype=np.float64)
    result = run(world, name, **options).params
    assert result["linear_0"]["kernel"].dtype == np.float64
    assert_close(result, expected(world, name, **options), 1e-9)


@pytest.mark.parametrize("name, calibrated", [c for c in CASES if c[0] not in ("average",)])
def test_merges_are_affine_in_their_scale(name, calibrated):
    """Tuning counts on it: one merge at scale 1 stands for all."""
    world = make_world(count=2 if name in PAIRS else 3)
    base = matrices(world.base)
    at_one = matrices(run(world, name, calibrated, scale=1.0).params)
    want = {n: m + 0.3 * (at_one[n] - m) for n, m in base.items()}
    assert_close(run(world, name, calibrated, scale=0.3).params, want, 1e-5)


def test_full_space_without_filter_in_the_metric_is_regmean(world):
    plain = {"energy": 1.0, "conflict": "none", "rescale": "none"}
    regmean = run(world, "regmean", True)
    assert_close(run(world, "pivot", True, gram="own", **plain).params, matrices(regmean.params))


def test_later_layers_of_the_merged_form_fit_the_experts_better():
    """Solving a layer on the inputs it will really get leaves a smaller error at the output than own Gram matrices."""
    world = make_world(seed=5)
    plain = {"conflict": "none", "rho": 1.0}

    def error(params):
        merged = matrices(params)
        total = 0.0
        for expert, x in zip(world.experts.values(), world.features):
            last = list(merged)[-1]
            mine, theirs = numpy_inputs(merged, x)[last], numpy_inputs(matrices(expert), x)[last]
            total += np.mean((mine @ merged[last].T - theirs @ matrices(expert)[last].T) ** 2)
        return total

    own, merged = (error(run(world, "pivot", True, gram=g, **plain).params) for g in ("own", "merged"))
    assert merged < 0.9 * own
