"""The contract of name tables: every name on both sides is accounted for, and a model is never held twice."""

import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pivotjax.checkpoints.names import Names, Rule, Transform, finite, leaves, load, transposed
from pivotjax.errors import InputError

NAMES = Names(
    (
        Rule("embedding", ("tok.weight",)),
        Rule("layers/{layer}/up/kernel", ("layer.{layer}.up.weight",), transposed),
        Rule(
            "blocks/{block}/bias",
            ("block.{block}.beta", "block.{block}.mean"),
            Transform(lambda beta, mean: beta - mean, None),
        ),
    ),
    aliases=((r"^transformer\.", ""), (r"^h\.(\d+)\.", r"layer.\1.")),
    ignore=(r"rope\.inv_freq",),
)
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


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(one, other, strict=True)


def test_every_leaf_gets_its_tensor():
    given = tensors()
    loaded = load(given, NAMES, SHAPES)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(SHAPES), strict=True):
        assert isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(loaded["embedding"], given["tok.weight"])
    for i in range(3):
        expected = given[f"layer.{i}.up.weight"].T.astype(jnp.bfloat16)
        np.testing.assert_array_equal(loaded["layers"]["up"]["kernel"][i], expected)
    for i in range(2):
        np.testing.assert_array_equal(loaded["blocks"][i]["bias"], given[f"block.{i}.beta"] - given[f"block.{i}.mean"])


def test_leaves_go_to_their_shardings():
    mesh = jax.make_mesh((1,), ("data",))
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*(None,) * (len(leaf.shape) - 1), "data")),
                             SHAPES)
    loaded = load(tensors(), NAMES, SHAPES, shardings=shardings)
    same(loaded, load(tensors(), NAMES, SHAPES))
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, loaded, shardings)))


def test_layers_apart_and_stacked_are_the_same_entries():
    apart = {"layers": {i: {"up": {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)}} for i in range(3)}}
    stacked = {"layers": SHAPES["layers"]}
    assert [leaf.entries[0] for leaf in leaves(NAMES, apart)] == list(leaves(NAMES, stacked)[0].entries)
    given = {name: value for name, value in tensors().items() if name.startswith("layer.")}
    in_one = load(given, NAMES, stacked)["layers"]["up"]["kernel"]
    for i in range(3):
        np.testing.assert_array_equal(load(given, NAMES, apart)["layers"][i]["up"]["kernel"], in_one[i])


def test_other_layouts_are_read_through_aliases():
    other = {f"transformer.{name.replace('layer.', 'h.')}": value for name, value in tensors().items()}
    same(load(other, NAMES, SHAPES), load(tensors(), NAMES, SHAPES))


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(InputError, match=r"tok\.weight and transformer\.tok\.weight are the same tensor"):
        load(tensors() | {"transformer.tok.weight": np.ones((5, 3))}, NAMES, SHAPES)


def test_a_table_within_a_larger_model():
    inner = NAMES.within("language", "language_model.").within("whole", "model.")
    given = {f"model.language_model.{name}": value for name, value in tensors().items()}
    shapes = {"whole": {"language": SHAPES}}
    expected = {"whole": {"language": load(tensors(), NAMES, SHAPES)}}
    same(load(given | {"model.language_model.rope.inv_freq": np.ones(1)}, inner, shapes), expected)
    renamed = {name.replace("_model.", "_model.transformer.").replace("layer.", "h."): v for name, v in given.items()}
    same(load(renamed, inner, shapes), expected)
    with pytest.raises(InputError, match="missing"):  # the aliases of a part touch nothing outside it
        load({name.replace("model.language_model.", "transformer."): v for name, v in given.items()}, inner, shapes)


def test_our_own_layout_is_a_table_too():
    given = tensors()
    entries = [entry for leaf in leaves(NAMES, SHAPES) for entry in leaf.entries]
    ours = {e.path: e.transform.forward(*(given[key] for key in e.keys)) for e in entries}
    assert "layers/2/up/kernel" in ours
    same(load(ours, NAMES.ours(), SHAPES), load(given, NAMES, SHAPES))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 40), (33, 7), (100, 1)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_transposed_there_and_back(shape, dtype):
    matrix = np.random.default_rng(0).normal(size=shape).astype(dtype)
    turned = transposed.forward(matrix)
    np.testing.assert_array_equal(turned, matrix.T, strict=True)
    np.testing.assert_array_equal(transposed.inverse(turned), matrix, strict=True)


FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_says_what_numpy_says(dtype):
    kind = jnp.finfo(dtype)
    assert finite(np.array([0, -0.0, kind.max, kind.min, kind.tiny], dtype)) and finite(np.zeros((0, 2), dtype))
    assert finite(np.ones((4, 6), dtype).T[::2])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        array = np.ones((3, 4), dtype)
        array[1, 2] = bad
        assert finite(array) == np.isfinite(array.astype(np.float64)).all()
        assert not finite(array.T[2])


def test_integers_are_finite():
    assert finite(np.array([-1, 2**31 - 1])) and finite(np.array([True]))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"layer.1.up.weight": None}, r"1 missing: layer\.1\.up\.weight"),
        ({"layer.1.up.weight": None, "layer.1.upp.weight": np.ones(8)}, r"1\.up\.weight \(nearest: layer\.1\.upp"),
        ({"layer.3.up.weight": np.ones((4, 2))}, r"1 unknown: layer\.3\.up\.weight"),
        ({"h.3.up.weight": np.ones((4, 2))}, r"1 unknown: h\.3\.up\.weight"),
        ({f"extra.{i}": np.ones(1) for i in range(9)}, r"9 unknown: .*and 5 more"),
        ({"layer.2.up.weight": np.ones((2, 4))}, r"layer\.2\.up\.weight.*\[4, 2\].*\[2, 4\]"),
        ({"tok.weight": np.full((5, 3), np.nan)}, r"tok\.weight.*finite"),
        ({"layer.0.up.weight": np.full((4, 2), 1e39)}, r"layer\.0\.up\.weight.*too large for bfloat16"),
    ],
)
def test_whatever_does_not_fit_is_one_clear_line(changed, words):
    with pytest.raises(InputError, match=words) as error:
        load(tensors(**changed), NAMES, SHAPES, where="model.bin")
    assert str(error.value).startswith("model.bin") and "\n" not in str(error.value)


def test_known_extras_are_ignored_by_whole_name():
    load(tensors(**{"rope.inv_freq": np.ones(1)}), NAMES, SHAPES)
    with pytest.raises(InputError, match=r"1 unknown: rope\.inv_freqs"):
        load(tensors(**{"rope.inv_freqs": np.ones(1)}), NAMES, SHAPES)


def test_a_parameter_without_a_rule_is_a_bug_not_bad_input():
    with pytest.raises(ValueError, match="norm/scale") as error:
        load(tensors(), NAMES, {**SHAPES, "norm": {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)}})
    assert not isinstance(error.value, InputError)


def test_few_tensors_of_the_checkpoint_are_held_at_a_time():
    class Lazy(Mapping):
        alive, most = set(), 0

        def __getitem__(self, name):
            class Tracked(np.ndarray):
                pass

            value = np.ones((4, 2), np.float32).view(Tracked)
            self.alive.add(id(value))
            weakref.finalize(value, self.alive.discard, id(value))
            Lazy.most = max(self.most, len(self.alive))
            return value

        def __iter__(self):
            return (f"layer.{i}.up.weight" for i in range(200))

        def __len__(self):
            return 200

    load(Lazy(), NAMES, {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((200, 2, 4), jnp.float32)}}})
    assert Lazy.most <= 8  # a few threads, each with the one it places and the one it reads
