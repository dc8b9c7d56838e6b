"""`pivotjax.merge` from Python, and the same merge from the command line."""

import json

import jax
import numpy as np
import pytest
from tiny_projectors import tiny

import pivotjax
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.models import projector


def experts():
    base = tiny(0)
    return base, [jax.tree.map(lambda w, d: w + 0.1 * d, base, tiny(seed)) for seed in (1, 2)]


def test_merge_takes_pytrees_and_returns_params_and_report():
    base, siblings = experts()
    merged = pivotjax.merge(base, siblings, method="pivot")
    assert isinstance(merged, tuple) and merged._fields == ("params", "report") and isinstance(merged, pivotjax.Merge)
    assert jax.tree.structure(merged.params) == jax.tree.structure(base)
    assert merged.report["method"] == "pivot" and merged.report["experts"] == ["expert_0", "expert_1"]
    json.dumps(merged.report)
    named = pivotjax.merge(base, dict(zip(("cats", "dogs"), siblings)), basis="cross")
    assert named.report["experts"] == ["cats", "dogs"] and named.report["options"]["basis"] == "cross"


def test_merge_of_numpy_and_of_other_trees():
    merged = pivotjax.merge(
        None, [{"a": np.ones(3), "b": [np.zeros((2, 2))]}, {"a": np.zeros(3), "b": [np.ones((2, 2))]}], "average"
    )
    np.testing.assert_array_equal(merged.params["a"], np.full(3, 0.5))
    np.testing.assert_array_equal(merged.params["b"][0], np.full((2, 2), 0.5))


def test_bad_input_is_an_input_error():
    base, siblings = experts()
    with pytest.raises(pivotjax.InputError, match="did you mean"):
        pivotjax.merge(base, siblings, method="pivott")
    with pytest.raises(pivotjax.InputError, match=r"no option 'energie' .did you mean 'energy'"):
        pivotjax.merge(base, siblings, energie=0.5)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "pivot"])
def test_command_line_merges_the_same(command, family, tmp_path, method):
    assert command("merge", family.recipe, "--merge-method", method).status == 0
    base, cats, dogs = (store.load_projector(family.folder / name).params for name in ("w0", "cats", "dogs"))
    expected = pivotjax.merge(base, {"cats": cats, "dogs": dogs}, method)
    saved = store.load_projector(tmp_path / "out/projector")
    jax.tree.map(np.testing.assert_array_equal, saved.params, expected.params)
    from_torch, info = torch_bridge.load_torch(tmp_path / "out/mm_projector.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_torch, saved.params)
    assert info == {key: value for key, value in saved.info.items() if key not in ("format", "fingerprint")}
    assert saved.info["init_id"] == "one" and saved.info["domains"] == ["cats", "dogs"]
    assert saved.info["merged_from"]["dogs"] == projector.fingerprint(dogs)
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["method"] == method and report["experts"] == ["cats", "dogs"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == report["files"] == [
        "README.md",
        "config.yaml",
        "merge_report.html",
        "merge_report.json",
        "mm_projector.safetensors",
        "projector",
    ]


def test_safetensors_experts_and_dtype(command, family, tmp_path):
    for name in ("w0", "cats", "dogs"):
        params, info = store.load_projector(family.folder / name)
        torch_bridge.save_torch(family.folder / f"{name}.safetensors", params, info)
    text = family.recipe.read_text()
    for name in ("w0", "cats", "dogs"):
        text = text.replace(f"/{name}", f"/{name}.safetensors")
    family.recipe.write_text(text)
    options = ("--dtype", "bfloat16", "--parameters.scale", 0.5, "--format", "orbax")
    assert command("merge", family.recipe, *options).status == 0
    saved = store.load_projector(tmp_path / "out/projector")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(saved.params)} == {"bfloat16"}
    assert saved.info["merge"]["options"]["scale"] == 0.5


def test_methods_lists_every_method(command):
    text = command("methods").out
    listed = json.loads(command("methods", "--json").out)
    assert {"average", "task_arithmetic", "ties", "regmean", "pivot"} <= {method["name"] for method in listed}
    for method in listed:
        assert method["name"] in text and method["source"] in text
        assert all(f"{option} = {facts['default']}" in text for option, facts in method["options"].items())
