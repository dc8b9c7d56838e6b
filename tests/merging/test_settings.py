"""Options that differ a tensor: gradients, filters, and what mergekit means by them."""

import numpy as np
import pytest
from small_world import make_world

import pivotjax
from pivotjax import InputError
from pivotjax.merging import settings

PATHS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{leaf}.weight" for i in range(3) for leaf in ("mlp.up", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]


def test_depth_is_the_blocks_and_all_else_lies_at_the_start():
    """mergekit: blocks at i / (n - 1); embeddings, the last norm and the head at 0; a single block at 1."""
    depths = settings.relative_depths(PATHS)
    assert depths["model.layers.0.norm.weight"] == 0 and depths["model.layers.1.mlp.up.weight"] == 0.5
    assert depths["model.layers.2.norm.weight"] == 1
    assert {depths[name] for name in PATHS if "layers" not in name} == {0.0}
    assert settings.relative_depths(["a.layers.0.b"]) == {"a.layers.0.b": 1.0}
    assert settings.relative_depths(["mm_projector.0.weight", "mm_projector.2.weight"]) == {
        "mm_projector.0.weight": 0.0, "mm_projector.2.weight": 1.0}
    assert settings.relative_depths(["linear_0/kernel", "linear_1/kernel", "linear_2/bias"])["linear_1/kernel"] == 0.5
    assert settings.block_count(PATHS) == 3 and settings.block_count(["a.weight"]) == 0


def test_towers_have_depths_of_their_own():
    names = [f"vision.blocks.{i}.w" for i in range(5)] + [f"language.layers.{i}.w" for i in range(3)]
    depths = settings.relative_depths(names)
    assert depths["vision.blocks.2.w"] == 0.5 and depths["language.layers.1.w"] == 0.5
    assert depths["vision.blocks.4.w"] == depths["language.layers.2.w"] == 1


@pytest.mark.parametrize("setting, depth, value", [
    (0.3, 0.5, 0.3),
    ([0, 1], 0.25, 0.25),
    ([0, 1, 0.5], 0.5, 1),
    ([0, 1, 0.5], 0.75, 0.75),
    ([0, 1, 0.5], 1.0, 0.5),
    ([2], 0.7, 2),
    ([True, False], 0.9, True),  # truth values and words are not interpolated
    (["norm", "none", "norm"], 0.5, "none"),
    ([{"filter": "mlp", "value": 1}, {"value": 2}], 0, 1),
    ([{"filter": "attn", "value": 1}, {"filter": "*", "value": [2, 4]}, {"value": 5}], 0.5, 3),
])  # fmt: skip
def test_evaluation(setting, depth, value):
    assert settings.evaluate(setting, "layers.1.mlp.up", depth) == value


def test_a_filter_list_that_does_not_fit_everything():
    with pytest.raises(InputError, match="no `filter` fits tensor 'b'"):
        settings.evaluate([{"filter": "a", "value": 1}], "b", 0)


@pytest.mark.parametrize("broken", [[], [[1], 2], [{"filter": "a"}], [{"value": 1, "fliter": "a"}], [1, {"value": 2}]])
def test_lists_that_are_no_settings(broken):
    assert "must be a list of values" in settings.problem(broken)
    base, expert = {"a.weight": np.zeros((2, 2), np.float32)}, {"a.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(InputError, match="must be a list of values"):
        pivotjax.merge(base, [expert], "ties", density=broken)


def test_a_merge_with_settings_is_each_tensor_merged_with_its_own_values():
    world = make_world()
    weights = {"emoji": [0.0, 1.0], "icons": 1.0, "shapes": [{"filter": "bias", "value": 3.0}, {"value": 0.5}]}
    whole = pivotjax.merge(world.base, world.experts, "task_arithmetic", weights=weights, scale=[0.2, 0.4])
    for i, layer in enumerate(world.base):
        for leaf in ("kernel", "bias"):
            plain = {"emoji": i / 2, "icons": 1.0, "shapes": 3.0 if leaf == "bias" else 0.5}
            alone = pivotjax.merge(world.base, world.experts, "task_arithmetic", weights=plain, scale=0.2 + 0.1 * i)
            np.testing.assert_allclose(whole.params[layer][leaf], alone.params[layer][leaf], atol=1e-6)


def test_a_layer_that_is_merged_as_one_matrix_keeps_its_bias():
    """Spectral methods see `[W | b]`: the bias takes the options of its weight, whatever a filter says of it."""
    world = make_world()
    both = [{"filter": "bias", "value": 0.1}, {"value": 0.9}]
    split = pivotjax.merge(world.base, world.experts, "pivot", scale=both).params
    plain = pivotjax.merge(world.base, world.experts, "pivot", scale=0.9).params
    np.testing.assert_allclose(split["linear_0"]["bias"], plain["linear_0"]["bias"], atol=1e-6)


def test_what_lies_between_two_whole_numbers_is_not_one():
    world = make_world()
    with pytest.raises(InputError, match="must be a whole number"):
        pivotjax.merge(world.base, world.experts, "karcher", iterations=[1, 2])


def test_many_experts_with_long_gradients_are_checked_at_once():
    """The check looks at every value by itself, not at every combination."""
    experts = {f"e{k}": {"a.weight": np.full((2, 2), k, np.float32)} for k in range(12)}
    weights = {name: [0.0, *(0.1 * i for i in range(1, 12))] for name in experts}
    base = {"a.weight": np.zeros((2, 2), np.float32)}
    pivotjax.merge(base, experts, "task_arithmetic", weights=weights)
    with pytest.raises(InputError, match="'much' of expert 'e11'"):
        pivotjax.merge(base, experts, "task_arithmetic", weights=weights | {"e11": [0.0, "much"]})
