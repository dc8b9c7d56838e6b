"""What calibrated methods may ask about data: the `Calibration` protocol, and a ready one over cached features.

Merging knows no model. A job that has one hands over an object of this protocol; `FeatureCalibration` is such an
object, made of three things that a job has anyway: the projector's layer inputs as a function, each expert's own
calibration features, and a caption loss.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging.updates import Layer, Updates, layout_of

Array = jax.Array
PyTree = Any


class Calibration(Protocol):
    """Statistics of calibration data. Expert k's "own" data are the calibration pairs of the domains it was trained on.

    A layer's name is the path of its leaves without the last component, joined by `/`: `linear_0`, `mlp/linear_0`.
    Parameters come in float32 (float64 where the experts are).
    The input of 1 that stands for a bias is always the last one, also of a layer without a bias (it is then left out).
    """

    def grams(self, params: PyTree) -> Mapping[str, Array]:
        """Gram matrices of every layer's inputs, expert k on its own data.

        Args:
            params: K experts' parameters, leaves `[K, ...]`.

        Returns:
            `{layer: X'X / rows}`, float32 `[K, d_in + 1, d_in + 1]` (`[K, depth, d_in + 1, d_in + 1]` for a scanned
            stack), rows of X being the visual tokens of all images. Nested dictionaries by path are fine too.
        """

    def cross_grams(self, teachers: PyTree, student: PyTree, layer: str) -> tuple[Array, Array]:
        """How the inputs of one layer differ between each expert and one other projector, on expert k's own data.

        Args:
            teachers: K experts' parameters, leaves `[K, ...]`; X_k are their inputs to the layer.
            student: one projector's parameters; H_k are its inputs to the layer on expert k's own data.
            layer: the layer's name.

        Returns:
            float32 `(H_k'H_k / rows, X_k'H_k / rows)`, both `[K, d_in + 1, d_in + 1]`.
        """

    def loss(self, params: PyTree) -> Array:
        """Caption loss in nats a token, pooled over the calibration pairs of *all* domains.

        Args:
            params: P projectors, leaves `[P, ...]`.

        Returns:
            float32 `[P]`.
        """


LayerInputs = Callable[[PyTree, Array], Mapping[str, Array]]


class FeatureCalibration:
    """A `Calibration` over features in memory, for a projector given as a function.

    Args:
        layer_inputs: `(params of one projector, features [rows, d]) -> {layer: inputs [rows, d_in]}`; pure, and one
            function object for the same projector (it is a static argument of jitted code). Names that are no layer
            of the parameters are ignored.
        features: each expert's own features, K arrays `[..., d]` with any leading axes and numbers of rows, in the
            order of the experts.
        caption_loss: what `Calibration.loss` promises. None: methods that ask for it are refused.
        chunk: rows that go through a projector at once.
    """

    def __init__(
        self,
        layer_inputs: LayerInputs,
        features: Sequence[np.ndarray],
        caption_loss: Callable[[PyTree], Array] | None = None,
        chunk: int = 2048,
    ):
        self.layer_inputs = layer_inputs
        self.caption_loss = caption_loss
        self._rows, self._weights = _chunked([np.asarray(own) for own in features], chunk)

    def grams(self, params: PyTree) -> dict[str, Array]:
        """See `Calibration.grams`."""
        self._check(params)
        return _grams(self.layer_inputs, params, self._rows, self._weights)

    def cross_grams(self, teachers: PyTree, student: PyTree, layer: str) -> tuple[Array, Array]:
        """See `Calibration.cross_grams`."""
        self._check(teachers)
        return _cross_grams(self.layer_inputs, teachers, student, layer, self._rows, self._weights)

    def loss(self, params: PyTree) -> Array:
        """See `Calibration.loss`."""
        if self.caption_loss is None:
            raise InputError("this calibration holds no captions, but scores='loss_gain' measures them: add some")
        return self.caption_loss(params)

    def _check(self, stacked: PyTree) -> None:
        experts = jax.tree.leaves(stacked)[0].shape[0]
        if experts != len(self._rows):
            raise InputError(f"calibration holds features of {len(self._rows)} experts, but {experts} are merged")


def _chunked(features: Sequence[np.ndarray], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """K arrays `[..., d]` -> rows `[K, chunks, chunk, d]`, weights `[K, chunks, chunk]`: 1 / own rows, 0 in padding."""
    flat = [own.reshape(-1, own.shape[-1]) for own in features]
    for k, own in enumerate(flat):
        if not len(own):
            raise InputError(f"calibration: expert {k} has no features; give it at least one image")
        if not np.isfinite(own).all():
            raise InputError(f"calibration: the features of expert {k} hold NaN or infinity; build them again")
    longest = max(len(own) for own in flat)
    chunk = min(chunk, longest)
    total = -(-longest // chunk) * chunk
    rows = np.zeros((len(flat), total, flat[0].shape[-1]), np.float32)
    weights = np.zeros((len(flat), total), np.float32)
    for k, own in enumerate(flat):
        rows[k, : len(own)] = own
        weights[k, : len(own)] = 1 / len(own)
    return rows.reshape(len(flat), -1, chunk, rows.shape[-1]), weights.reshape(len(flat), -1, chunk)


def gram(x: Array, weights: Array, y: Array | None = None) -> Array:
    """`[x 1]' diag(weights) [y 1]` in float32, highest precision.

    Args:
        x: `[rows, a]`, any floating dtype.
        weights: `[rows]`; 1 / rows for a mean.
        y: `[rows, b]`; None: x.

    Returns:
        float32 `[a + 1, b + 1]`.
    """
    left, right = _with_one(x), _with_one(x if y is None else y)
    return jnp.matmul((left * weights[:, None]).T, right, precision="highest", preferred_element_type=jnp.float32)


def _with_one(x: Array) -> Array:
    return jnp.concatenate([x.astype(jnp.float32), jnp.ones((*x.shape[:-1], 1), jnp.float32)], axis=-1)


@partial(jax.jit, static_argnums=0)
def _grams(layer_inputs: LayerInputs, params: PyTree, rows: Array, weights: Array) -> dict[str, Array]:
    def of_chunk(one: PyTree, x: Array, w: Array) -> dict[str, Array]:
        seen, layers = layer_inputs(one, x), layout_of(one).layers
        return {layer.name: gram(seen[layer.name], w) for layer in layers}

    return jax.vmap(partial(_sum_over_chunks, of_chunk))(params, rows, weights)


@partial(jax.jit, static_argnums=(0, 3))
def _cross_grams(
    layer_inputs: LayerInputs, teachers: PyTree, student: PyTree, layer: str, rows: Array, weights: Array
) -> tuple[Array, Array]:
    def of_chunk(teacher: PyTree, x: Array, w: Array) -> tuple[Array, Array]:
        taught, learnt = layer_inputs(teacher, x)[layer], layer_inputs(student, x)[layer]
        return gram(learnt, w), gram(taught, w, learnt)

    return jax.vmap(partial(_sum_over_chunks, of_chunk))(teachers, rows, weights)


def _sum_over_chunks(of_chunk: Callable[..., PyTree], params: PyTree, rows: Array, weights: Array) -> PyTree:
    """Sums `of_chunk(params, rows[i], weights[i])` over the chunks, one chunk in memory at a time."""
    like = jax.eval_shape(of_chunk, params, rows[0], weights[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def add(total, chunk):
        return jax.tree.map(jnp.add, total, of_chunk(params, *chunk)), None

    return jax.lax.scan(add, zeros, (rows, weights))[0]


def own_grams(calibration: Calibration, updates: Updates) -> dict[str, Array]:
    """`calibration.grams` of the experts, checked and cut to the layers' matrices.

    Returns:
        `{layer: [K, n, d_in (+1), d_in (+1)]}` in the updates' dtype; the last row and column are the bias's.

    Raises:
        InputError: a layer without a Gram matrix, a wrong shape, a value that is not finite.
    """
    given = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(calibration.grams(updates.tree(_weights(updates))))
    }
    grams = {}
    for layer in updates.layout.layers:
        if layer.name not in given:
            raise InputError(f"calibration gives no Gram matrix for layer {layer.name!r}; it gives {', '.join(given)}")
        leading = (len(updates.names), *layer.lead)
        grams[layer.name] = checked_gram(given[layer.name], layer, leading, updates)
    return grams


@jax.jit
def _weights(updates: Updates) -> list[Array]:
    return updates.weights


def checked_gram(given: Array, layer: Layer, leading: tuple[int, ...], updates: Updates) -> Array:
    """One Gram matrix or cross moment `[*leading, d_in + 1, d_in + 1]` -> `[K, n, d_in (+1), d_in (+1)]`, checked."""
    expected = (*leading, layer.d_in + 1, layer.d_in + 1)
    if given.shape != expected:
        raise InputError(f"calibration: the Gram matrix of layer {layer.name!r} has shape {list(given.shape)}, not "
                         f"{list(expected)} (the input of 1 comes last)")
    size = layer.matrix_shape[1]
    dtype = updates.dtype
    matrix = jnp.asarray(given, dtype).reshape(leading[0], layer.count, *expected[-2:])[..., :size, :size]
    if not bool(jnp.isfinite(matrix).all()):
        raise InputError(f"calibration: the Gram matrix of layer {layer.name!r} is not finite; check the features")
    return matrix
