"""Merge recipes: mergekit's vocabulary, strict."""

import pytest

from pivotjax import InputError
from pivotjax.merging import METHODS, mergekit, recipe

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
tokenizer_source: base
"""


def test_recipe():
    read = recipe.parse(OURS)
    assert read.models == (("emoji", "out/experts/emoji.safetensors"), ("icons", "out/experts/icons.safetensors"))
    assert (read.base_model, read.merge_method, read.dtype) == ("out/w0.safetensors", "pivot", "float32")
    assert read.parameters == {"basis": "cross", "scale": 0.7}
    assert read.calibration == {"images": 128} and read.notes == ()


def test_mergekit_recipe():
    read = recipe.parse(MERGEKIT)
    assert [name for name, _ in read.models] == ["first/projector", "second/projector"]
    assert read.parameters == {
        "weights": {"first/projector": 0.3, "second/projector": 0.7},
        "density": {"first/projector": 0.5, "second/projector": 0.25},
        "normalize": True,
        "scale": 1.0,
    }
    assert read.dtype == "float16"
    said = " ".join(read.notes)
    assert "tokenizer_source is ignored" in said and "int8_mask is ignored" in said and "scale = 1.0" in said
    assert "density" not in said


@pytest.mark.parametrize("method, weight, parameters", [
    ("task_arithmetic", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}, "scale": 1.0}),  # mergekit's lambda
    ("task_arithmetic", "{}", {}),  # ours: .3
    ("ties", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}, "scale": 1.0, "density": 1.0}),
    ("ties", "{weight: -1.0}", {"weights": {"a": -1.0, "b": -1.0}, "scale": 1.0, "density": 1.0}),
    ("linear", "{weight: 1.0}", {"weights": {"a": 1.0, "b": 1.0}}),
])  # fmt: skip
def test_what_mergekit_leaves_out_means_what_mergekit_means(method, weight, parameters):
    base = "" if method == "linear" else "base_model: c\n"
    text = f"models: [{{model: a, parameters: {weight}}}, {{model: b, parameters: {weight}}}]\n{base}"
    read = recipe.parse(text + f"merge_method: {method}")
    assert read.parameters == parameters
    assert read.merge_method == ("average" if method == "linear" else method)
    everywhere = recipe.parse(f"models: [a, b]\nmerge_method: {method}\n{base}parameters: {weight}")
    assert everywhere.parameters == parameters


def test_whose_defaults_may_be_said_in_so_many_words():
    text = "models: [a, b]\nbase_model: c\nmerge_method: ties\n"
    assert recipe.parse(text).parameters == {}
    assert recipe.parse(text + "defaults: mergekit").parameters == {"scale": 1.0, "density": 1.0}
    weighted = text + "parameters: {weight: 1.0}\n"
    assert recipe.parse(weighted).parameters["density"] == 1.0
    for read in (recipe.parse(weighted + "defaults: pivotjax"), recipe.parse(weighted, defaults="pivotjax")):
        assert read.parameters == {"weights": {"a": 1.0, "b": 1.0}} and read.notes == ()


def test_what_mergekit_accepts_and_does_not_use_is_left_out_with_a_note():
    read = recipe.parse("models: [a]\nbase_model: c\nmerge_method: task_arithmetic\n"
                        "parameters: {weight: 1, density: 0.5, rescale: true}")
    assert read.parameters == {"weights": {"a": 1}, "scale": 1.0}
    assert any("density is ignored" in note for note in read.notes)


def test_the_base_is_a_model_where_mergekit_merges_it_too():
    """`linear` averages the base like any other model, whether or not it is listed."""
    for models in ("[a, c]", "[a]"):
        read = recipe.parse(f"models: {models}\nbase_model: c\nmerge_method: linear\nparameters: {{weight: 0.5}}")
        assert read.models == (("c", "c"), ("a", "a")) and read.base_model is None and read.donor == "c"
        assert read.parameters == {"weights": {"c": 0.5, "a": 0.5}}


def test_settings_that_differ_a_tensor():
    read = recipe.parse("""
models:
  - model: a
    parameters:
      weight: [0, 1]
      density: [{filter: mlp, value: [0.1, 0.9]}]
  - model: b
    parameters: {weight: {filter: attn, value: 2}}
base_model: c
merge_method: ties
parameters:
  weight: 0.5
  density: [{filter: norm, value: 0.3}]
  lambda: {value: 1e-1}
""")
    assert read.parameters["weights"] == {"a": [0, 1], "b": [{"filter": "attn", "value": 2}, {"value": 0.5}]}
    rest = [{"filter": "norm", "value": 0.3}, {"value": 1.0}]  # the recipe's, then mergekit's default
    assert read.parameters["density"] == {"a": [{"filter": "mlp", "value": [0.1, 0.9]}, *rest], "b": rest}
    assert read.parameters["scale"] == [{"value": 0.1}]


def test_a_single_slice_of_whole_models():
    text = """
slices:
  - sources:
      - {model: a, layer_range: [0, 32], parameters: {weight: 0.5}}
      - {model: b, layer_range: [0, 32], parameters: {weight: 0.5}}
    parameters: {density: 0.4}
merge_method: ties
base_model: c
"""
    read = recipe.parse(text)
    assert read.blocks == 32 and read.parameters["weights"] == {"a": 0.5, "b": 0.5}
    assert read.parameters["density"] == 0.4
    for cut in (text.replace("[0, 32], parameters: {weight: 0.5}}\n      - {model: b", "[0, 31]}\n      - {model: b"),
                text.replace("[0, 32]", "[8, 32]")):
        with pytest.raises(InputError, match="cutting layers"):
            recipe.parse(cut)


def test_bases_that_nobody_has():
    for word in ("mean", "zero"):
        assert recipe.parse(f"models: [a, b]\nbase: {word}\nmerge_method: ties").base_model == word


@pytest.mark.parametrize("name", mergekit.METHODS)
def test_the_table_of_mergekit_speaks_of_methods_and_options_that_exist(name):
    theirs = mergekit.METHODS[name]
    options = METHODS[theirs.ours].options
    assert set(theirs.defaults) <= set(options) and set(theirs.words.values()) <= set(options)
    assert not set(theirs.idle) & set(options)


@pytest.mark.parametrize("text, words", [
    ("models: [a", ["not valid YAML"]),
    ("[a, b]", ["mapping"]),
    ("models: []", ["models must be a list"]),
    ("slices: []", ["slices", "write `models`"]),
    ("modules: {}", ["unknown key 'modules'"]),
    ("models: [a, b]\nbase_modle: c", ["unknown key 'base_modle'", "did you mean 'base_model'"]),
    ("models: [a, b]\nbase_model: c\nbase: c", ["base and base_model"]),
    ("models: [a, b]\nmerge_method: tise\nbase_model: c", ["unknown merge method 'tise'", "did you mean 'ties'"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: c\nparameters: {densty: 1}", ["did you mean 'density'"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: c\nparameters: {density: many}", ["'many' must be a number"]),
    ("models: [a, b]\nmerge_method: ties", ["base_model", "mean or zero"]),
    ("models: [a, b]\nmerge_method: regmean", ["calibration"]),
    ("models: [a, b]\nmerge_method: average\ndtype: float23", ["dtype 'float23'", "did you mean 'float32'"]),
    ("models: [a, b]\nmerge_method: average\ndefaults: theirs", ["defaults 'theirs'"]),
    ("models: [a, b]\nmerge_method: pivot\ndefaults: mergekit", ["no method 'pivot'"]),
    ("models: [a, a]\nmerge_method: average", ["two models are called 'a'"]),
    ("models: [{model: a, parameters: {scale: 1}}, b]\nbase: c\nmerge_method: ties", ["'scale' cannot be set for one"]),
    ("models: [{model: a, parameters: {weigth: 1}}, b]\nmerge_method: average", ["did you mean 'weights'"]),
    ("models: [{model: a, parameters: {weight: 1}}, b]\nmerge_method: average", ["no value for expert 'b'"]),
    ("models: [a, b]\nmerge_method: average\nparameters: {weights: {a: 1, b: 1, d: 1}}", ["no expert is called 'd'"]),
    ("models: [a, b]\nmerge_method: average\nparameters: {weight: [[1], 2]}", ["must be a list of values"]),
    ("models: [a, b]\nmerge_method: average\nparameters: {weight: [{filter: a}]}", ["must be a list of values"]),
    ("models: [other.yaml, b]\nmerge_method: average", ["other.yaml is a recipe", "merge it first"]),
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
