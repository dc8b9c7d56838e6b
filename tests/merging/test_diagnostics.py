"""Diagnostics against NumPy float64, written from the formulas in `diagnostics.full`, and on known answers."""

import json
from itertools import combinations

import jax
import numpy as np
import pytest
from small_world import make_world, matrices

import pivotjax
from pivotjax.merging import diagnostics


def full(base, experts, method="average", **options):
    return pivotjax.merge(base, experts, method, diagnose="full", **options).report["layers"]


def reference(updates, merged):
    """`full` of one layer: `{expert: D_k}` and M, float64."""
    names, stacked = list(updates), np.stack(list(updates.values()))
    d_out, d_in = merged.shape
    r, q = min(64, d_out, d_in), min(64, max(1, min(d_out, d_in) // 4))
    u, s, v = zip(*(np.linalg.svd(d) for d in stacked))
    pairs = list(combinations(range(len(names)), 2))
    joint_u, joint_s, _ = np.linalg.svd(np.hstack(list(stacked)))
    coefficients = np.stack([joint_u[:, :r].T @ d for d in stacked])
    mixed = (stacked > 0).any(0) & (stacked < 0).any(0)

    def cosine(a, b):
        return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

    def opposite(a, b):
        return np.mean((a * b < 0)[(a != 0) & (b != 0)])

    def opposite_weighted(a, b):
        return np.abs(a * b)[a * b < 0].sum() / np.abs(a * b).sum()

    def table(f):
        return [[f(a, b) for b in stacked] for a in stacked]

    def overlaps(bases):
        return {f"{names[j]} & {names[k]}": np.linalg.svd(bases[j][:, :q].T @ bases[k][:, :q])[1] for j, k in pairs}

    def effective(sizes):
        return np.sum(sizes**2) ** 2 / np.sum(sizes**4)

    return {
        "shape": [d_out, d_in],
        "update_norms": {n: np.linalg.norm(d) for n, d in updates.items()},
        "cosines": table(cosine),
        "singular_values": {n: sizes[:r] for n, sizes in zip(names, s)},
        "effective_rank": {n: effective(sizes) for n, sizes in zip(names, s)},
        "subspace_overlap": {"left": overlaps(u), "right": overlaps([one.T for one in v])},
        "sign_conflicts": {
            "share": mixed.sum() / (stacked != 0).any(0).sum(),
            "weighted": np.abs(stacked)[:, mixed].sum() / np.abs(stacked).sum(),
            "pairs": table(opposite),
            "weighted_pairs": table(opposite_weighted),
        },
        "shared_directions": {
            "singular_values": joint_s[:r],
            "consensus": np.linalg.norm(coefficients.mean(0), axis=1)
            / np.linalg.norm(coefficients, axis=2).mean(0),
        },
        "merge": {
            "norm": np.linalg.norm(merged),
            "singular_values": np.linalg.svd(merged)[1][:r],
            "effective_rank": effective(np.linalg.svd(merged)[1]),
            "distance": {n: np.linalg.norm(merged - d) / np.linalg.norm(d) for n, d in updates.items()},
            "cosine": {n: cosine(merged, d) for n, d in updates.items()},
        },
    }


def assert_facts(got, want, rtol):
    assert jax.tree.structure(got, is_leaf=lambda x: isinstance(x, list)) == jax.tree.structure(
        want, is_leaf=lambda x: isinstance(x, (list, np.ndarray))
    )

    def close(path, a, b):
        scale = max(1.0, np.max(np.abs(b), initial=0))
        np.testing.assert_allclose(a, b, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want, is_leaf=lambda x: isinstance(x, (list, np.ndarray)))


def updates_of(base, experts, layer):
    return {name: matrices(expert)[layer] - matrices(base)[layer] for name, expert in experts.items()}


@pytest.mark.parametrize("sizes", [(7, 6, 6, 6), (90, 100, 80), (3, 1, 2)])
@pytest.mark.parametrize("dtype, rtol", [(np.float32, 2e-4), (np.float64, 1e-7)])
def test_every_number_against_float64(sizes, dtype, rtol):
    world = make_world(sizes=sizes, dtype=dtype)
    result = pivotjax.merge(world.base, world.experts, "ties", diagnose="full", density=0.5)
    for layer, facts in result.report["layers"].items():
        updates = updates_of(world.base, world.experts, layer)
        merged = matrices(result.params)[layer] - matrices(world.base)[layer]
        assert_facts(facts, reference(updates, merged), rtol)


def test_sparse_updates_conflict_where_they_meet():
    """By hand: entries that are 0 in one expert conflict with nothing and are not counted."""
    a, b = np.float32([[1, -2, 0, 3, 0]]), np.float32([[-1, -4, 5, 0, 0]])
    conflicts = full({"weight": 0 * a}, {"a": {"weight": a}, "b": {"weight": b}})["weight"]["sign_conflicts"]
    assert conflicts["pairs"] == [[0, 0.5], [0.5, 0]]
    assert conflicts["weighted_pairs"][0][1] == pytest.approx(1 / 9)
    assert (conflicts["share"], conflicts["weighted"]) == (0.25, 0.125)


def test_identical_opposite_and_unrelated_experts():
    rng = np.random.default_rng(0)
    one, others = rng.normal(size=(80, 90)), rng.normal(size=(3, 80, 90))
    base = {"weight": np.zeros((80, 90), np.float32)}

    def facts(*experts):
        return full(base, [{"weight": np.float32(e)} for e in experts])["weight"]

    same, against, unrelated = facts(one, one), facts(one, -one), facts(*others)
    for found, cosine, consensus, conflict in ((same, 1, 1, 0), (against, -1, 0, 1), (unrelated, 0, 3**-0.5, 0.75)):
        assert found["cosines"][0][1] == pytest.approx(cosine, abs=0.04)
        np.testing.assert_allclose(found["shared_directions"]["consensus"], consensus, atol=0.15)
        assert found["sign_conflicts"]["share"] == pytest.approx(conflict, abs=0.02)
    for side in ("left", "right"):
        np.testing.assert_allclose(against["subspace_overlap"][side]["expert_0 & expert_1"], 1, atol=1e-4)
        cosines = np.array(list(unrelated["subspace_overlap"][side].values()))
        assert np.mean(cosines**2) == pytest.approx(20 / (80 if side == "left" else 90), abs=0.05)
    assert same["merge"]["distance"]["expert_0"] == 0
    assert same["effective_rank"]["expert_0"] == pytest.approx(same["merge"]["effective_rank"], rel=1e-5)


def test_effective_rank_counts_equal_values():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 7)))[0]
    found = full({"weight": np.zeros((40, 40), np.float32)}, [{"weight": np.float32(3 * basis @ basis.T)}])["weight"]
    assert found["effective_rank"]["expert_0"] == pytest.approx(7, rel=1e-5)
    np.testing.assert_allclose(found["singular_values"]["expert_0"][:7], 3, rtol=1e-5)
    assert max(found["singular_values"]["expert_0"][7:]) < 1e-2


def test_one_expert_and_no_updates():
    """Nothing to compare with: no pairs, no conflicts, and no division by zero."""
    world = make_world(count=1)
    for facts in full(world.base, world.experts).values():
        assert facts["subspace_overlap"] == {"left": {}, "right": {}}
        assert facts["sign_conflicts"] == {"share": 0, "weighted": 0, "pairs": [[0]], "weighted_pairs": [[0]]}
        np.testing.assert_allclose(facts["shared_directions"]["consensus"], 1, atol=1e-5)
    idle = full(world.base, [world.base, world.base])
    assert json.dumps(idle, allow_nan=False)
    for facts in idle.values():
        del facts["shape"]
        assert not np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(facts)]).any()


def test_low_rank_updates_have_no_overlap_beyond_their_rank():
    """Directions without size are nobody's: rank 2 updates in one plane share 2 directions, not 16."""
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(64, 2)))[0]
    experts = [{"weight": np.float32(plane @ rng.normal(size=(2, 70)))} for _ in range(2)]
    found = full({"weight": np.zeros((64, 70), np.float32)}, experts)["weight"]["subspace_overlap"]["left"]
    np.testing.assert_allclose(found["expert_0 & expert_1"], [1, 1] + 14 * [0], atol=2e-3)


def test_layers_beyond_the_exact_size():
    """The range finder: exact where the spectrum falls off, a few per cent low on white noise, as documented."""
    rng = np.random.default_rng(0)
    size = diagnostics._EXACT + 6
    left, right = (np.linalg.qr(rng.normal(size=(size, 200)))[0] for _ in range(2))
    falling = np.float32(left * np.arange(1, 201) ** -1.0 @ right.T)
    noise = np.float32(rng.normal(size=(size, size)))
    found = full({"weight": 0 * noise}, {"falling": {"weight": falling}, "noise": {"weight": noise}})["weight"]
    np.testing.assert_allclose(found["singular_values"]["falling"], 1 / np.arange(1, 65), atol=1e-4)
    exact = np.linalg.svd(noise, compute_uv=False)
    low = (exact[:64] - found["singular_values"]["noise"]) / exact[0]
    assert low.min() > -1e-4 and low.max() < 0.06
    participation = np.sum(exact.astype(float) ** 2) ** 2 / np.sum(exact.astype(float) ** 4)
    assert found["effective_rank"]["noise"] == pytest.approx(participation, rel=1e-3)


def test_scanned_layers_have_a_report_each():
    world = make_world(sizes=(6, 6, 6, 6))

    def stacked(params):
        return {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *params.values())}

    alone = full(world.base, world.experts)
    scanned = full(stacked(world.base), {name: stacked(expert) for name, expert in world.experts.items()})
    assert list(scanned) == ["layers[0]", "layers[1]", "layers[2]"]
    for got, want in zip(scanned.values(), alone.values()):
        assert_facts(got, jax.tree.map(np.array, want, is_leaf=lambda x: isinstance(x, list)), 1e-5)


def test_methods_facts_and_diagnostics_stand_side_by_side(world):
    layers = full(world.base, world.experts, "pivot")
    brief = pivotjax.merge(world.base, world.experts, "pivot").report["layers"]
    assert json.loads(json.dumps(layers, allow_nan=False)) == layers
    for layer, facts in layers.items():
        assert set(facts) > {"energy_kept", "weights", "consensus", "shared_directions", "merge", *brief[layer]}


def test_traced_diagnostics_are_the_same_numbers(world):
    def merged(base, experts):
        return pivotjax.merge(base, experts, "ties", diagnose="full")

    traced = jax.jit(lambda base, experts: merged(base, experts).report["layers"])(world.base, world.experts)
    want = merged(world.base, world.experts).report["layers"]
    for layer, facts in diagnostics.plain({"layers": traced})["layers"].items():
        assert_facts(facts, jax.tree.map(np.array, want[layer], is_leaf=lambda x: isinstance(x, list)), 1e-4)


def test_numbers_are_written_short():
    plain = diagnostics.plain({"layer": {"a": np.float32(0.1), "b": [np.array([0.2, 3], np.float32)], "c": "word"}})
    assert json.dumps(plain) == '{"layer": {"a": 0.1, "b": [[0.2, 3.0]], "c": "word"}}'
