"""Merge recipes: mergekit's vocabulary, strict."""

import pytest

from pivotjax import InputError
from pivotjax.merging import recipe

OURS = """
models:
  - model: out/experts/emoji.safetensors
  - model: out/experts/icons.safetensors
base_model: out/w0.safetensors
merge_method: pivot
parameters: {basis: cross, lambda: 0.7}
dtype: float32
calibration: {images: 128}
"""
# As in mergekit's documentation: weights and densities a model, the base among the models.
MERGEKIT = """
models:
  - model: base
  - model: first/projector
    parameters: {density: 0.5, weight: 0.3}
  - model: second/projector
    parameters: {weight: 0.7}
merge_method: ties
base_model: base
parameters:
  density: 0.25
  normalize: true
  int8_mask: true
dtype: float16
"""


def test_recipe():
    read = recipe.parse(OURS)
    assert read.models == (("emoji", "out/experts/emoji.safetensors"), ("icons", "out/experts/icons.safetensors"))
    assert (read.base_model, read.merge_method, read.dtype) == ("out/w0.safetensors", "pivot", "float32")
    assert read.parameters == {"basis": "cross", "scale": 0.7}
    assert read.calibration == {"images": 128}


def test_mergekit_recipe():
    read = recipe.parse(MERGEKIT)
    assert [name for name, _ in read.models] == ["first/projector", "second/projector"]
    assert read.parameters == {
        "weights": {"first/projector": 0.3, "second/projector": 0.7},
        "density": {"first/projector": 0.5, "second/projector": 0.25},
        "normalize": True,
        "scale": 1.0,
    }


@pytest.mark.parametrize("method, weight, parameters", [
    ("task_arithmetic", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}, "scale": 1.0}),  # mergekit's lambda
    ("task_arithmetic", "{}", {}),  # ours: .3
    ("ties", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}, "scale": 1.0, "density": 1.0}),
    ("linear", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}}),
])  # fmt: skip
def test_what_mergekit_leaves_out_means_what_mergekit_means(method, weight, parameters):
    text = f"models: [{{model: a, parameters: {weight}}}, {{model: b, parameters: {weight}}}]\n"
    read = recipe.parse(text + f"merge_method: {method}\nbase_model: c")
    assert read.parameters == parameters
    assert read.merge_method == ("average" if method == "linear" else method)
    everywhere = recipe.parse(f"models: [a, b]\nmerge_method: {method}\nbase_model: c\nparameters: {weight}")
    assert everywhere.parameters == parameters


@pytest.mark.parametrize("text, words", [
    ("models: [a", ["not valid YAML"]),
    ("[a, b]", ["mapping"]),
    ("models: []", ["models must be a list"]),
    ("models: [a, b]\nslices: []", ["unknown key 'slices'"]),
    ("models: [a, b]\nbase_modle: c", ["unknown key 'base_modle'", "did you mean 'base_model'"]),
    ("models: [a, b]\nmerge_method: tise\nbase_model: c", ["unknown merge method 'tise'", "did you mean 'ties'"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: c\nparameters: {densty: 1}", ["did you mean 'density'"]),
    ("models: [a, b]\nmerge_method: ties", ["base_model"]),
    ("models: [a, b]\nmerge_method: regmean", ["calibration"]),
    ("models: [a, b]\nmerge_method: average\ndtype: float23", ["dtype 'float23'", "did you mean 'float32'"]),
    ("models: [a, a]\nmerge_method: average", ["two models are called 'a'"]),
    ("models: [{model: a, parameters: {scale: 1}}, b]\nmerge_method: average", ["'scale' cannot be set for one model"]),
    ("models: [{model: a, parameters: {weight: 1}}, b]\nmerge_method: average", ["no value for expert 'b'"]),
    ("models: [{model: a, parameters: {weight: [0, 1]}}, b]\nmerge_method: average", ["[0, 1]"]),
    ("models: [{modle: a}]\nmerge_method: average", ["unknown key 'modle'"]),
    ("models: [{parameters: {weight: 1}}]\nmerge_method: average", ["entry 1 has no `model: PATH`"]),
    ("models: [c]\nbase_model: c\nmerge_method: ties", ["no expert besides the base"]),
])  # fmt: skip
def test_what_is_refused(text, words):
    with pytest.raises(InputError) as error:
        recipe.parse(text, where="my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml") and "\n" not in message
    assert all(word in message for word in words), message


def test_experts_with_equal_file_names_are_told_apart_by_folders():
    read = recipe.parse("models: [runs/emoji/projector, runs/icons/projector]\nmerge_method: average")
    assert [name for name, _ in read.models] == ["emoji/projector", "icons/projector"]
    named = recipe.parse("models: [{model: x/p, name: one}, {model: x/p, name: two}]\nmerge_method: average")
    assert [name for name, _ in named.models] == ["one", "two"]


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the merge recipe .*none\.yaml"):
        recipe.load(tmp_path / "none.yaml")
