"""What calibrated methods may ask about data: the `Calibration` protocol, and a ready one over cached features.

Merging knows no model. A job that has one hands over an object of this protocol; `FeatureCalibration` is such an
object, made of things that a job has anyway: the projector's layer inputs as a function, each expert's own calibration
features, and what a model says of the calibration captions.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.errors import InputError
from pivotjax.merging.updates import Layer, Updates, finite, is_traced, layout_of

Array = jax.Array
PyTree = Any
Objective = Literal["caption", "entropy"]
Measure = Literal["cosine", "cka"]


class Calibration(Protocol):
    """Statistics of calibration data. Expert k's "own" data are the calibration pairs of the domains it was trained on.

    A layer's name is the path of its leaves without the last component, joined by `/`: `linear_0`, `mlp/linear_0`.
    Parameters come in float32 (float64 where the experts are).
    The input of 1 that stands for a bias is always the last one, also of a layer without a bias (it is then left out).
    An implementation that works on the host (reads files, loops over batches) refuses traced parameters: InputError.
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

    def loss_gradient(self, params: PyTree, objective: Objective) -> tuple[Array, PyTree]:
        """A loss pooled over the calibration pairs of *all* domains, and its gradient.

        Args:
            params: P projectors, leaves `[P, ...]`.
            objective: `caption`, the caption loss that `loss` measures; `entropy`, the entropy of the model's own
                predictions at the captions' positions (the caption so far is read, the next token is not looked at).
                Both are sums over all tokens divided by the number of tokens, in nats.

        Returns:
            `[P]`, and gradients with leaves `[P, ...]`: projector p's loss with respect to its own parameters.
        """

    def fisher(self, params: PyTree) -> PyTree:
        """Diagonal of the empirical Fisher information of every parameter, expert k on its own pairs.

        `F_k = mean over pairs (x, y) of (d log p(y | x) / d W_k)^2`: y is the reference caption as a whole (its
        log-likelihood is a sum over its tokens, the end included), one gradient a pair, squared before the mean.

        Args:
            params: K experts' parameters, leaves `[K, ...]`.

        Returns:
            Leaves `[K, ...]`, at least 0.
        """

    def alignment(self, params: PyTree, measure: Measure) -> Array:
        """Agreement of projected images with their captions in the LLM's input space, over the pairs of *all* domains.

        Args:
            params: P projectors, leaves `[P, ...]`.
            measure: see `agreement`; compared are an image's mean visual token and the mean embedding of its caption's
                tokens (without the end token, which all captions share).

        Returns:
            `[P]`; larger is better.
        """


LayerInputs = Callable[[PyTree, Array], Mapping[str, Array]]


class FeatureCalibration:
    """A `Calibration` over cached features, for a projector given as a function.

    Args:
        layer_inputs: `(params of one projector, features [rows, d]) -> {layer: inputs [rows, d_in]}`; pure, and one
            function object for the same projector (it is a static argument of jitted code). Names that are no layer
            of the parameters are ignored.
        features: each expert's own features, in the order of the experts: K arrays `[n, ..., d]`, or K sequences of n
            items `[..., d]` of one shape that need not be in memory.
        caption_loss: what `Calibration.loss` promises. None: methods that ask for it are refused; likewise
            caption_gradient (`Calibration.loss_gradient`), caption_fisher (`.fisher`), caption_alignment
            (`.alignment`).
        chunk: rows that go through a projector at once.
        memory: bytes of features to hold at once. What takes no more is read once and kept; what takes more is read in
            blocks of this size, anew for every statistic.
    """

    def __init__(
        self,
        layer_inputs: LayerInputs,
        features: Sequence[Sequence[np.ndarray]],
        caption_loss: Callable[[PyTree], Array] | None = None,
        caption_gradient: Callable[[PyTree, Objective], tuple[Array, PyTree]] | None = None,
        caption_fisher: Callable[[PyTree], PyTree] | None = None,
        caption_alignment: Callable[[PyTree, Measure], Array] | None = None,
        chunk: int = 2048,
        memory: int = 1 << 28,
    ):
        self.layer_inputs = layer_inputs
        self._captions = {
            "caption loss": caption_loss,
            "gradient of the caption loss": caption_gradient,
            "Fisher information": caption_fisher,
            "alignment with captions": caption_alignment,
        }
        self._rows = _Rows(features, chunk, memory)

    def grams(self, params: PyTree) -> dict[str, Array]:
        """See `Calibration.grams`."""
        self._check(params)
        return _sum(_grams(self.layer_inputs, params, *block) for block in self._rows.blocks())

    def cross_grams(self, teachers: PyTree, student: PyTree, layer: str) -> tuple[Array, Array]:
        """See `Calibration.cross_grams`."""
        self._check(teachers)
        return _sum(_cross_grams(self.layer_inputs, teachers, student, layer, *b) for b in self._rows.blocks())

    def loss(self, params: PyTree) -> Array:
        """See `Calibration.loss`."""
        return self._asked("caption loss")(params)

    def loss_gradient(self, params: PyTree, objective: Objective) -> tuple[Array, PyTree]:
        """See `Calibration.loss_gradient`."""
        return self._asked("gradient of the caption loss")(params, objective)

    def fisher(self, params: PyTree) -> PyTree:
        """See `Calibration.fisher`."""
        self._check(params)
        return self._asked("Fisher information")(params)

    def alignment(self, params: PyTree, measure: Measure) -> Array:
        """See `Calibration.alignment`."""
        return self._asked("alignment with captions")(params, measure)

    def _asked(self, what: str) -> Callable:
        if self._captions[what] is None:
            raise InputError(f"this calibration holds no captions, but the {what} is asked for: add some")
        return self._captions[what]

    def _check(self, stacked: PyTree) -> None:
        experts = jax.tree.leaves(stacked)[0].shape[0]
        if experts != self._rows.experts:
            raise InputError(f"calibration holds features of {self._rows.experts} experts, but {experts} are merged")


class _Rows:
    """Feature rows of K experts in blocks of one shape: rows `[K, chunks, chunk, d]`, weights `[K, chunks, chunk]`.

    A weight is 1 / the expert's number of rows, 0 in padding. One block that holds everything is kept.
    """

    def __init__(self, features: Sequence[Sequence[np.ndarray]], chunk: int, memory: int):
        for k, own in enumerate(features):
            if not len(own):
                raise InputError(f"calibration: expert {k} has no features; give it at least one image")
        self._features, first = features, [np.shape(own[0]) for own in features]
        self._rows = [math.prod(shape[:-1]) for shape in first]  # of an item
        self._d = first[0][-1]
        longest = max(len(own) * rows for own, rows in zip(features, self._rows))
        most = max(memory // (4 * self._d * len(features)), *self._rows)
        length = min(longest, most)  # rows of an expert in a block
        self._items = [length // rows for rows in self._rows]
        self._chunk = min(chunk, length)
        self._chunks = -(-length // self._chunk)
        self._count = max(-(-len(own) // items) for own, items in zip(features, self._items))
        self._only = self._block(0) if self._count == 1 else None

    @property
    def experts(self) -> int:
        return len(self._features)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._only is not None:
            yield self._only
            return
        for number in range(self._count):
            yield self._block(number)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.zeros((self.experts, self._chunks * self._chunk, self._d), np.float32)
        weights = np.zeros(rows.shape[:2], np.float32)
        for k, (own, items, each) in enumerate(zip(self._features, self._items, self._rows)):
            for place, item in enumerate(range(number * items, min((number + 1) * items, len(own)))):
                rows[k, place * each : (place + 1) * each] = np.reshape(own[item], (each, self._d))
                weights[k, place * each : (place + 1) * each] = 1 / (len(own) * each)
            if not np.isfinite(rows[k]).all():
                raise InputError(f"calibration: the features of expert {k} hold NaN or infinity; build them again")
        shape = (self.experts, self._chunks, self._chunk)
        return rows.reshape(*shape, self._d), weights.reshape(shape)


def _sum(trees: Iterator[PyTree]) -> PyTree:
    return functools.reduce(partial(jax.tree.map, jnp.add), trees)


def agreement(visual: Array, captions: Array, measure: Measure) -> Array:
    """Agreement of N images with their captions.

    Args:
        visual: one vector an image, `[N, d]`.
        captions: one vector a caption, `[N, d]`.
        measure: `cosine`, the mean over pairs of their cosine, in [-1, 1]; `cka`, linear centred kernel alignment
            (arXiv 1905.00414) `|Xc'Yc|^2 / (|Xc'Xc| |Yc'Yc|)` with columns centred over the pairs, in [0, 1]: blind to
            rotations, scale and offset. It compares how pairs lie to each other and says little of few: it is biased
            upwards where N is not much larger than d.

    Returns:
        A scalar; 0 where a vector (a centred matrix) is 0.
    """
    product = partial(jnp.matmul, precision="highest")
    if measure == "cosine":
        lengths = jnp.linalg.norm(visual, axis=-1) * jnp.linalg.norm(captions, axis=-1)
        return ((visual * captions).sum(-1) / jnp.where(lengths > 0, lengths, 1)).mean()
    x, y = (side - side.mean(0) for side in (visual, captions))
    inner, other = product(x, x.T), product(y, y.T)  # [N, N]: |X'Y|^2 = <XX', YY'>
    scale = jnp.linalg.norm(inner) * jnp.linalg.norm(other)
    return (inner * other).sum() / jnp.where(scale > 0, scale, 1)


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
        for path, leaf in jax.tree_util.tree_leaves_with_path(calibration.grams(updates.all_parameters()))
    }
    grams = {}
    for layer in updates.layout.layers:
        if layer.name not in given:
            raise InputError(f"calibration gives no Gram matrix for layer {layer.name!r}; it gives {', '.join(given)}")
        leading = (len(updates.names), *layer.lead)
        grams[layer.name] = checked_gram(given[layer.name], layer, leading, updates)
    return grams


def checked_gram(given: Array, layer: Layer, leading: tuple[int, ...], updates: Updates) -> Array:
    """One Gram matrix or cross moment `[*leading, d_in + 1, d_in + 1]` -> `[K, n, d_in (+1), d_in (+1)]`, checked."""
    expected = (*leading, layer.d_in + 1, layer.d_in + 1)
    if given.shape != expected:
        raise InputError(f"calibration: the Gram matrix of layer {layer.name!r} has shape {list(given.shape)}, not "
                         f"{list(expected)} (the input of 1 comes last)")
    size = layer.matrix_shape[1]
    dtype = updates.dtype
    matrix = jnp.asarray(given, dtype).reshape(leading[0], layer.count, *expected[-2:])[..., :size, :size]
    if not is_traced(matrix) and not bool(jnp.isfinite(matrix).all()):
        raise InputError(f"calibration: the Gram matrix of layer {layer.name!r} is not finite; check the features")
    return matrix


def own_fishers(calibration: Calibration, updates: Updates) -> list[Array]:
    """`calibration.fisher` of the experts, checked: one `[K, ...]` a leaf.

    Raises:
        InputError: another structure or shape than the experts', a value that is not finite.
    """
    given = calibration.fisher(updates.all_parameters())
    leaves = _checked_leaves(given, updates, len(updates.names), "Fisher information")
    if not is_traced(leaves) and not all(map(bool, map(finite, leaves))):
        raise InputError("calibration: the Fisher information is not finite; check features and experts")
    return leaves


def pooled_gradient(
    calibration: Calibration, updates: Updates, params: PyTree, objective: Objective
) -> tuple[Array, list[Array]]:
    """`calibration.loss_gradient` of P projectors shaped like the experts, checked: `[P]`, one `[P, ...]` a leaf."""
    loss, gradient = calibration.loss_gradient(params, objective)
    return loss, _checked_leaves(gradient, updates, loss.shape[0], "gradient of the loss")


def _checked_leaves(tree: PyTree, updates: Updates, count: int, what: str) -> list[Array]:
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    expected = [(count, *shape) for shape in updates.layout.shapes]
    if treedef != updates.layout.treedef or [leaf.shape for leaf in leaves] != expected:
        raise InputError(f"calibration: the {what} must have the experts' structure, and a leading axis of {count}")
    return leaves
