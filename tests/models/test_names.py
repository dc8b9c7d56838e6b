"""The contract of name tables: every name on both sides is accounted for, and a model is never held twice."""

import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pivotjax.checkpoints.names import Rule, load, transposed
from pivotjax.errors import InputError

RULES = [
    Rule("embedding", ("tok.weight",)),
    Rule("layers/up/kernel", ("layer.{layer}.up.weight",), transposed),
    Rule("blocks/{block}/bias", ("block.{block}.beta", "block.{block}.mean"), lambda beta, mean: beta - mean),
]
SHAPES = {
    "embedding": jax.ShapeDtypeStruct((5, 3), jnp.float32),
    "layers": {"up": {"kernel": jax.ShapeDtypeStruct((3, 2, 4), jnp.bfloat16)}},
    "blocks": {i: {"bias": jax.ShapeDtypeStruct((2,), jnp.float32)} for i in range(2)},
}


def tensors(**changed):
    random = np.random.default_rng(0)
    every = {"tok.weight": (5, 3), **{f"layer.{i}.up.weight": (4, 2) for i in range(3)}}
    every |= {f"block.{i}.{part}": (2,) for i in range(2) for part in ("beta", "mean")}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in every.items()}
    return {name: value for name, value in (arrays | changed).items() if value is not None}


def test_every_leaf_gets_its_tensor():
    given = tensors()
    loaded = load(given, RULES, SHAPES)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(SHAPES), strict=True):
        assert isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(loaded["embedding"], given["tok.weight"])
    for i in range(3):
        expected = given[f"layer.{i}.up.weight"].T.astype(jnp.bfloat16)
        np.testing.assert_array_equal(loaded["layers"]["up"]["kernel"][i], expected)
    for i in range(2):
        np.testing.assert_array_equal(loaded["blocks"][i]["bias"], given[f"block.{i}.beta"] - given[f"block.{i}.mean"])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"layer.1.up.weight": None}, r"1 missing: layer\.1\.up\.weight"),
        ({"layer.1.up.weight": None, "layer.1.upp.weight": np.ones(8)}, r"1\.up\.weight \(nearest: layer\.1\.upp"),
        ({"layer.3.up.weight": np.ones((4, 2))}, r"1 unknown: layer\.3\.up\.weight"),
        ({f"extra.{i}": np.ones(1) for i in range(9)}, r"9 unknown: .*and 5 more"),
        ({"layer.2.up.weight": np.ones((2, 4))}, r"layer\.2\.up\.weight.*\[4, 2\].*\[2, 4\]"),
        ({"tok.weight": np.full((5, 3), np.nan)}, r"tok\.weight.*finite"),
        ({"layer.0.up.weight": np.full((4, 2), 1e39)}, r"layer\.0\.up\.weight.*finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_whatever_does_not_fit_is_one_clear_line(changed, words):
    with pytest.raises(InputError, match=words) as error:
        load(tensors(**changed), RULES, SHAPES, where="model.bin")
    assert str(error.value).startswith("model.bin") and "\n" not in str(error.value)


def test_known_extras_are_ignored_by_whole_name():
    extra = tensors(**{"rope.inv_freq": np.ones(1)})
    load(extra, RULES, SHAPES, ignore=[r"rope\.inv_freq"])
    with pytest.raises(InputError, match=r"rope\.inv_freq"):
        load(extra, RULES, SHAPES, ignore=[r"rope"])


def test_a_parameter_without_a_rule_is_a_bug_not_bad_input():
    with pytest.raises(ValueError, match="norm/scale") as error:
        load(tensors(), RULES, {**SHAPES, "norm": {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)}})
    assert not isinstance(error.value, InputError)


def test_one_tensor_of_the_checkpoint_is_held_at_a_time():
    class Lazy(Mapping):
        alive, most = set(), 0

        def __getitem__(self, name):
            class Tracked(np.ndarray):
                pass

            value = (tensors()[name] + 0).view(Tracked)
            self.alive.add(id(value))
            weakref.finalize(value, self.alive.discard, id(value))
            Lazy.most = max(self.most, len(self.alive))
            return value

        def __iter__(self):
            return iter(tensors())

        def __len__(self):
            return len(tensors())

    load(Lazy(), [RULES[1]], {"layers": SHAPES["layers"]}, ignore=["tok.*", "block.*"])
    assert Lazy.most <= 2  # the entry being placed and the next one being read
