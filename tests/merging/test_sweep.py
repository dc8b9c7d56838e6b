"""Sweeps: every candidate is measured as if it had been merged alone, with as few merges and calls as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_world import caption_loss, make_world

import pivotjax
from pivotjax.errors import InputError
from pivotjax.merging import tuning
from pivotjax.merging.tuning import Trial


class Measured:
    """A calibration that counts its calls."""

    def __init__(self, loss=caption_loss):
        self.stacks, self._loss = [], loss

    def loss(self, params):
        self.stacks.append(jax.tree.leaves(params)[0].shape[0])
        return self._loss(params)


def merging(world, method, merges, **fixed):
    def merge_at(options):
        merges.append(options)
        return pivotjax.merge(world.base, world.experts, method, **{**fixed, **options}).params

    return merge_at


@pytest.mark.parametrize("method, fixed", [("ties", {"normalize": False}), ("pivot", {"gram": "none"})])
def test_one_merge_serves_all_scales(world, method, fixed):
    merges, measured, scales = [], Measured(), [0.0, 0.5, 1.7, -1.0]
    trials = tuning.sweep(world.base, merging(world, method, merges, **fixed), {"scale": scales}, measured)
    assert merges == [{"scale": 1.0}] and measured.stacks == [4]
    for scale, trial in zip(scales, trials):
        alone = merging(world, method, [], **fixed)({"scale": scale})
        loss = caption_loss(jax.tree.map(lambda leaf: leaf[None], alone))
        assert trial.options == {"scale": scale} and trial.loss == pytest.approx(float(loss[0]), rel=1e-4)


def test_a_grid_merges_once_for_each_other_option(world):
    """In the order of the axes, whichever of them is the scale."""
    merges, axes = [], {"scale": [0.5, 1.0], "density": [0.2, 0.6, 1.0], "normalize": [True, False]}
    trials = tuning.sweep(world.base, merging(world, "ties", merges), axes, Measured())
    assert len(merges) == 6 and all(options["scale"] == 1 for options in merges)
    expected = [{"scale": s, "density": d, "normalize": n}
                for s in axes["scale"] for d in axes["density"] for n in axes["normalize"]]  # fmt: skip
    assert [trial.options for trial in trials] == expected
    for trial in trials[::5]:
        alone = merging(world, "ties", [])(trial.options)
        loss = caption_loss(jax.tree.map(lambda leaf: leaf[None], alone))
        assert trial.loss == pytest.approx(float(loss[0]), rel=1e-4)


def test_stacks_are_as_large_as_memory_allows(world, monkeypatch):
    axes = {"density": [k / 7 for k in range(1, 8)]}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(world.base))
    measured = Measured()
    plain = tuning.sweep(world.base, merging(world, "ties", []), axes, measured)
    assert measured.stacks == [7]
    monkeypatch.setattr(tuning, "_STACK_BYTES", 3 * size + 1)
    measured = Measured()
    assert tuning.sweep(world.base, merging(world, "ties", []), axes, measured) == plain
    assert measured.stacks == [3, 3, 1]
    monkeypatch.setattr(tuning, "_STACK_BYTES", 1)
    measured = Measured()
    tuning.sweep(world.base, merging(world, "ties", []), axes, measured)
    assert measured.stacks == 7 * [1]


def test_scales_of_half_precision_stay_apart():
    """A step of scale below bfloat16's rounding still moves the candidates."""
    base, merged = ({"scale": jnp.full(4, value, jnp.bfloat16)} for value in (100.0, 101.0))
    measured = Measured(lambda params: params["scale"][:, 0])
    trials = tuning.sweep(base, lambda _: merged, {"scale": [0.5, 0.501]}, measured)
    np.testing.assert_allclose([trial.loss for trial in trials], [100.5, 100.501], rtol=1e-6)


def test_the_best_is_the_lowest_finite_and_the_first_of_equals():
    losses = [np.nan, 3.0, -np.inf, 2.0, 2.0]
    trials = [Trial({"scale": k}, loss) for k, loss in enumerate(losses)]
    assert tuning.best(trials).options == {"scale": 3}
    with pytest.raises(InputError, match="none of 1 candidates has a finite calibration loss"):
        tuning.best(trials[:1])


def test_tuned_scale_is_the_minimum(world):
    """Of the loss as a parabola of the scale, with its lowest value between two that are tried."""
    target = pivotjax.merge(world.base, world.experts, "ties", scale=0.62).params

    def distance(params):
        return sum(jnp.square(a - b).reshape(len(a), -1).sum(-1)
                   for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target)))  # fmt: skip

    at_one = pivotjax.merge(world.base, world.experts, "ties", scale=1.0).params
    tuned = tuning.tune_scale(world.base, at_one, Measured(distance))
    assert tuned.best == 0.6 and tuned.values == list(tuning.SCALES) and len(tuned.loss) == len(tuned.values)
    assert min(tuned.loss) == tuned.loss[tuned.values.index(0.6)]


def test_what_cannot_be_swept(world):
    with pytest.raises(InputError, match="give a base, or leave scale out"):
        tuning.sweep(None, lambda _: world.base, {"scale": [1.0]}, Measured())
    with pytest.raises(InputError, match="no values to try for 'density'"):
        tuning.sweep(world.base, lambda _: world.base, {"scale": [1.0], "density": []}, Measured())


def test_calibrated_merges_are_swept_too():
    world = make_world()

    def merge_at(options):
        return pivotjax.merge(world.base, world.experts, "regmean", calibration=world.calibration, **options).params

    trials = tuning.sweep(world.base, merge_at, {"rho": [0.0, 0.9]}, world.calibration)
    alone = [jax.tree.map(lambda leaf: leaf[None], merge_at({"rho": rho})) for rho in (0.0, 0.9)]
    expected = [float(caption_loss(params)[0]) for params in alone]
    np.testing.assert_allclose([trial.loss for trial in trials], expected, rtol=1e-5)
