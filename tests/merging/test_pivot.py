"""PivotMerge where the truth is known: planted shared spaces, conflicts, layer weights."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_world import make_world

import pivotjax
from pivotjax.merging import decomposition, spectral


def planted(rng, strength, count=3, d_out=60, d_in=80, rank=6):
    """Updates: one shared pattern in one output space, and each a domain part `strength` times as large in its own."""
    space = np.linalg.qr(rng.normal(size=(d_out, rank)))[0]
    shared = space @ rng.normal(size=(rank, d_in))
    updates = []
    for _ in range(count):
        own = np.linalg.qr(rng.normal(size=(d_out, rank)))[0] @ rng.normal(size=(rank, d_in))
        updates.append(shared + strength * own + 0.02 * rng.normal(size=(d_out, d_in)))
    return space, np.stack(updates).astype(np.float32)


def recovered(space, updates, basis):
    """Share of the planted space that the leading directions hold: 1 all of it, rank / d_out by chance."""
    stack = jnp.asarray(updates)[:, None]
    _, vectors = spectral.shared_space(decomposition.moment(stack, stack.swapaxes(-1, -2), basis))
    found = np.asarray(vectors)[0][:, : space.shape[1]]
    return np.linalg.norm(space.T @ found) ** 2 / space.shape[1]


# Domain part / shared part -> share of the shared space that each basis recovers, mean of seeds 0 to 9; the table of
# docs/methods.md.
PLANTED = {
    0.2: {"energy": 1.00, "cross": 1.00, "average": 1.00},
    0.5: {"energy": 0.99, "cross": 0.99, "average": 0.99},
    1: {"energy": 0.90, "cross": 0.98, "average": 0.97},
    2: {"energy": 0.31, "cross": 0.89, "average": 0.71},
    3: {"energy": 0.17, "cross": 0.69, "average": 0.37},
    5: {"energy": 0.13, "cross": 0.39, "average": 0.17},
}


@pytest.mark.parametrize("strength", PLANTED)
def test_which_basis_recovers_a_planted_shared_space(strength):
    """`cross` finds what experts share where `energy` follows the domains; with a small domain part all find it."""
    for basis, want in PLANTED[strength].items():
        share = np.mean([recovered(*planted(np.random.default_rng(seed), strength), basis) for seed in range(10)])
        assert share == pytest.approx(want, abs=0.015), basis


def test_conflicting_experts():
    """Two experts that differ in one output direction: opposite there, equal elsewhere. By hand: with the conflict
    projection the opposite rows cancel exactly, however unequal, and without it the larger one wins."""
    base = {"kernel": np.zeros((3, 2), np.float32)}
    same, direction = np.float32([5, 0, 0]), np.float32([0, 1, 0])
    experts = {"a": {"kernel": np.stack([same, 3 * direction], 1)}, "b": {"kernel": np.stack([same, -direction], 1)}}
    options = {"gram": "none", "basis": "energy", "energy": 1.0, "rescale": "none"}
    projected = pivotjax.merge(base, experts, "pivot", conflict="project", **options)
    np.testing.assert_allclose(projected.params["kernel"], np.stack([same, 0 * direction], 1), atol=1e-5)
    plain = pivotjax.merge(base, experts, "pivot", conflict="none", **options)
    np.testing.assert_allclose(plain.params["kernel"], np.stack([same, direction], 1), atol=1e-5)


def test_hard_gate_drops_unshared_directions():
    """Three experts with one row in common and one row each of their own, orthogonal: consensus 1 and 1 / sqrt(3)."""
    updates = np.zeros((3, 2, 6), np.float32)
    updates[:, 0, 0] = 4
    for k in range(3):
        updates[k, 1, 1 + k] = 1
    experts = [{"kernel": u.T} for u in updates]
    base = {"kernel": np.zeros((6, 2), np.float32)}
    options = {"gram": "none", "basis": "energy", "energy": 1.0, "conflict": "none", "rescale": "none"}
    merged = pivotjax.merge(base, experts, "pivot", gate="hard", tau=0.6, **options)
    np.testing.assert_allclose(merged.params["kernel"].T, [[4, 0, 0, 0, 0, 0], [0] * 6], atol=1e-5)
    np.testing.assert_allclose(merged.report["layers"]["kernel"]["consensus"], [1, 3**-0.5], atol=1e-5)
    kept = pivotjax.merge(base, experts, "pivot", gate="hard", tau=0.55, **options)
    np.testing.assert_allclose(kept.params["kernel"].T[1], [0, 1 / 3, 1 / 3, 1 / 3, 0, 0], atol=1e-5)


def test_rescaling_restores_the_experts_norm(world):
    merged = pivotjax.merge(world.base, world.experts, "pivot", gram="none", rescale="expert_norm", rank=2)
    for name, facts in merged.report["layers"].items():
        delta = [merged.params[name][leaf] - world.base[name][leaf] for leaf in ("kernel", "bias")]
        norm = np.sqrt(sum(np.sum(np.square(d)) for d in delta))
        np.testing.assert_allclose(norm, np.mean(list(facts["update_norms"].values())), rtol=1e-5)


def test_loss_gain_weighs_the_expert_that_helps():
    """The loss of the fixture grows with the weights, so the expert with the smallest layer gains most."""
    world = make_world()
    for leaf in ("kernel", "bias"):
        world.experts["icons"]["linear_1"][leaf] *= 0.1
    options = {"scores": "loss_gain", "temperature": 0.1, "gram": "updates"}
    merged = pivotjax.merge(world.base, world.experts, "pivot", calibration=world.calibration, **options)
    weights = merged.report["layers"]["linear_1"]["weights"]
    assert max(weights, key=weights.get) == "icons"
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5)


def test_layers_are_weighed_by_their_scores(world):
    """`g^l = L softmax_l(mean score / T)` times each layer's update of the uniform form."""
    options = {"scores": "energy", "temperature": 0.2, "basis": "energy", "rank": 2}
    plain = pivotjax.merge(world.base, world.experts, "pivot", **options)
    weighed = pivotjax.merge(world.base, world.experts, "pivot", layer_weights="scores", **options)
    means = np.array([np.mean(list(facts["scores"].values())) for facts in plain.report["layers"].values()])
    factors = len(means) * np.exp(means / 0.2) / np.exp(means / 0.2).sum()
    assert np.ptp(factors) > 0.05
    for factor, name in zip(factors, plain.report["layers"]):
        change, scaled = (result.params[name]["kernel"] - world.base[name]["kernel"] for result in (plain, weighed))
        np.testing.assert_allclose(scaled, factor * change, atol=1e-5)


def test_the_bias_can_be_averaged(world):
    """Then the weight is decomposed without it, and the report says so."""
    result = pivotjax.merge(world.base, world.experts, "pivot", bias="averaged", rescale="none", gram="none")
    mean = np.mean([e["linear_1"]["bias"] for e in world.experts.values()], axis=0)
    np.testing.assert_allclose(result.params["linear_1"]["bias"], mean, atol=1e-6)
    assert result.report["exceptions"]["linear_1/bias"].startswith("averaged")
    alone = {name: {"linear_1": {"kernel": e["linear_1"]["kernel"]}} for name, e in world.experts.items()}
    base = {"linear_1": {"kernel": world.base["linear_1"]["kernel"]}}
    want = pivotjax.merge(base, alone, "pivot", rescale="none", gram="none").params["linear_1"]["kernel"]
    np.testing.assert_allclose(result.params["linear_1"]["kernel"], want, atol=1e-6)
    calibrated = pivotjax.merge(world.base, world.experts, "pivot", calibration=world.calibration, bias="averaged")
    assert np.isfinite(calibrated.params["linear_1"]["kernel"]).all()


@pytest.mark.parametrize("calibrated", [False, True])
def test_part_of_a_larger_program(world, calibrated):
    """Inside `jax.jit` the merge is the same, and the report's arrays come out of the program."""
    extra = {"calibration": world.calibration} if calibrated else {}

    @jax.jit
    def program(base, experts):
        result = pivotjax.merge(base, experts, "pivot", **extra)
        return result.params, result.report["layers"]

    params, layers = program(world.base, world.experts)
    outside = pivotjax.merge(world.base, world.experts, "pivot", **extra)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, outside.params)
    assert layers["linear_0"]["rank"] == outside.report["layers"]["linear_0"]["rank"]


def test_report_is_json_and_complete(world):
    for extra in ({}, {"calibration": world.calibration}):
        report = pivotjax.merge(world.base, world.experts, "pivot", **extra).report
        assert report["options"]["gram"] == ("merged" if extra else "updates")
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        for facts in report["layers"].values():
            assert set(facts) == {"update_norms", "cosines", "rank", "spectrum", "consensus", "energy_kept",
                                  "energy_kept_by_expert", "weights", "scores", "rescale"}  # fmt: skip
            assert facts["cosines"][0][0] == pytest.approx(1, abs=1e-5)
            assert all(0 <= value <= 1.00001 for value in facts["consensus"])


SPEED = """
import time
import numpy as np
import pivotjax

rng = np.random.default_rng(0)


def params(spread):
    return {f"linear_{i}": {"kernel": (spread * rng.normal(size=(d, 576))).astype(np.float32),
                            "bias": np.zeros(576, np.float32)} for i, d in enumerate((1280, 576))}


base, experts = params(0.03), [params(0.05) for _ in range(3)]
pivotjax.merge(base, experts, "pivot")
started = time.process_time()
pivotjax.merge(base, experts, "pivot")
print(time.process_time() - started)
"""


def test_projectors_of_real_size_take_seconds():
    """Three experts of a 1280 -> 576 -> 576 projector: processor time of the second call, measured 1.1 s. LAPACK has
    one thread: several spin, and their time counts, while they wait for a busy machine."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SPEED], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 5
