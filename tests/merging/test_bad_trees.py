"""Bad input: one clear line that names what and where."""

import numpy as np
import pytest

import pivotjax
from pivotjax import InputError


def refused(base, experts, method="average", **options):
    with pytest.raises(InputError) as error:
        pivotjax.merge(base, experts, method, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_parameters_that_cannot_be_merged(world):
    base, experts = world.base, world.experts
    assert "at least one expert" in refused(base, {})

    narrow = {"kernel": np.zeros((6, 5), np.float32), "bias": np.zeros(5, np.float32)}
    smaller = experts["icons"] | {"linear_1": narrow}
    message = refused(base, experts | {"icons": smaller})
    assert "'icons'" in message and "linear_1/bias" in message and "[5]" in message and "[6]" in message

    missing = {name: layer for name, layer in experts["icons"].items() if name != "linear_2"}
    message = refused(base, experts | {"icons": missing})
    assert "the base has leaf 'linear_2/bias'" in message and "'icons'" in message
    assert "'emoji' has leaf 'linear_2/bias'" in refused(None, experts | {"icons": missing})

    broken = {name: {leaf: value.copy() for leaf, value in layer.items()} for name, layer in experts["shapes"].items()}
    broken["linear_0"]["kernel"][2, 3] = np.nan
    message = refused(base, experts | {"shapes": broken})
    assert "'shapes'" in message and "linear_0/kernel" in message and "NaN" in message

    integers = {name: {leaf: value.astype(np.int32) for leaf, value in layer.items()} for name, layer in base.items()}
    assert "int32" in refused(base, {"a": integers})
    assert "no arrays" in refused(None, {"a": {}})


def test_overflow_is_refused():
    """A merge that leaves float16's range does not return infinities."""
    base, expert = {"scale": np.zeros(2, np.float16)}, {"scale": np.full(2, 60000, np.float16)}
    assert "overflows float16" in refused(base, [expert, expert], "task_arithmetic", scale=1.0)


@pytest.mark.parametrize("method, options, words", [
    ("pivto", {}, ["unknown merge method 'pivto'", "did you mean 'pivot'"]),
    ("ties", {"densty": 0.5}, ["no option 'densty'", "did you mean 'density'"]),
    ("ties", {"density": 0}, ["density", "in (0, 1]"]),
    ("ties", {"density": {"emoji": 0.5}}, ["density", "no value for expert 'icons'"]),
    ("ties", {"normalize": 1}, ["normalize", "true or false"]),
    ("average", {"weights": {"emojis": 1.0}}, ["no expert is called 'emojis'", "did you mean 'emoji'"]),
    ("average", {"weights": {"emoji": 0, "icons": 0, "shapes": 0}}, ["all values are 0"]),
    ("task_arithmetic", {"scale": "much"}, ["scale", "must be a number"]),
    ("task_arithmetic", {"scale": float("nan")}, ["scale", "must be a number"]),
    ("task_arithmetic", {"scale": 1.0, "lambda": 1.0}, ["scale or lambda"]),
    ("pivot", {"basis": "crosss"}, ["basis", "energy, cross", "did you mean 'cross'"]),
    ("pivot", {"rank": 0}, ["rank", "at least 1"]),
    ("pivot", {"rank": 2.5}, ["rank", "whole number"]),
    ("pivot", {"temperature": 0}, ["temperature", "above 0"]),
    ("pivot", {"gram": "own"}, ["gram='own'", "calibration"]),
    ("pivot", {"gram": "merged"}, ["gram='merged'", "calibration"]),
    ("pivot", {"scores": "loss_gain"}, ["loss_gain", "calibration"]),
    ("regmean", {}, ["regmean", "calibration"]),
])  # fmt: skip
def test_methods_and_options(world, method, options, words):
    message = refused(world.base, world.experts, method, **options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "pivot"])
def test_methods_that_need_a_base(world, method):
    assert "base" in refused(None, world.experts, method)


def test_regmean_needs_a_base_for_updates_only(world):
    assert "on='weights'" in refused(None, world.experts, "regmean", calibration=world.calibration)
    assert "scale" in refused(None, world.experts, "regmean", calibration=world.calibration, on="weights", scale=0.5)
    pivotjax.merge(None, world.experts, "regmean", calibration=world.calibration, on="weights")


def test_calibration_that_does_not_fit(world):
    two = {name: world.experts[name] for name in ("emoji", "icons")}
    message = refused(world.base, two, "regmean", calibration=world.calibration)
    assert "features of 3 experts, but 2 are merged" in message
    world.features[1][0, 0] = np.inf
    with pytest.raises(InputError, match="expert 1 hold NaN or infinity"):
        _ = world.calibration
    world.features[1] = world.features[1][:0]
    with pytest.raises(InputError, match="expert 1 has no features"):
        _ = world.calibration


class Wrong:
    """A calibration whose Gram matrices lack the input of 1."""

    def grams(self, params):
        return {name: np.zeros((3, 6, 6), np.float32) for name in params}


def test_gram_matrices_of_a_wrong_shape(world):
    message = refused(world.base, world.experts, "regmean", calibration=Wrong())
    assert "'linear_0'" in message and "[3, 6, 6]" in message and "[3, 8, 8]" in message
