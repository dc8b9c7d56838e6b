"""PivotMerge (arXiv 2604.22823): shared-space decomposition and filtering, alignment-guided layer-wise merging.

[read] The task and the two components are the paper's. [ours] Their formulas below are our reconstruction: the paper's
body was not available. Every choice with more than one plausible reading is a named option.

A layer's update `D_k` (bias joined as an input column) is seen through what it does: `E_k = D_k M^(1/2)`, with a
metric `M` on the layer's inputs (the mean of the experts' `G_k`, or each expert's own), `G_k` the second moment of the
inputs on expert k's own data. `gram="none"` takes the identity: then `E_k = D_k`.

1. Shared space: orthonormal output directions `u_1 ... u_r` (spectral.shared_space).
2. Decomposition: `c_ki = u_i' E_k`, shared pattern `s_i = mean_k c_ki`; what lies outside the space is the residual.
3. Filtering: conflict projection, consensus gate, residual; back from `E` to filtered updates `D~_k`.
4. Merging: weights `alpha_k = softmax_k(score_k / T)` a layer, `W = W0 + scale * D` with
   - `gram="none"`: `D = f sum_k alpha_k D~_k`, `f` bringing it to the experts' mean norm (`rescale`);
   - otherwise the `D` nearest to what the filtered updates do to their own data, with a pull to `f D~_k` that decides
     where the data do not:
     `min_D sum_k alpha_k (rho |D H_k' - Y_k|^2 + (1 - rho) |(D - f D~_k) diag(H_k'H_k)^(1/2)|^2)`.
     `own`: `H_k = X_k`, `Y_k = D~_k X_k'` (at f = 1 and without a filter this is RegMean on updates).
     `merged`: layer after layer; a later layer's inputs `H_k` come from the layers already merged, its targets are what
     the experts computed on their own inputs: `Y_k = (W0 + D~_k) X_k' - W0 H_k'`.
     `updates`: `own` without data: `G_k = (D_k'D_k)^2`, scaled to a mean diagonal of 1. An update is a sum of outer
     products of errors and inputs, so its row space is that of the inputs. Squaring sharpens a spectrum that is
     flatter than the inputs' (we think by Adam's normalisation). It is a rough guess, hence its small `rho`.

What the defaults rest on: real experts (emoji, icons, shapes; SmolLM2-135M, 1280 -> 576 -> 576, 200 steps), caption
loss a token, mean over the three domains of 24 captions each of the *calibration* split that no Gram matrix saw (those
come from 64 other images a domain). The guess, its power and `rho` were chosen on seed 0; seed 1 came after.

| | seed 0 | seed 1 |
|---|---|---|
| best single expert | 5.06 | 4.90 |
| average x 1, 1.8, 2.2 (x 2.2 is task arithmetic at .73) | 7.14, 6.36, 6.41 | 9.38, 8.07, 7.62 |
| TIES, scale 1 | 6.08 | 7.54 |
| `gram="none"`, else defaults | 6.39 | 8.24 |
| the same, `energy` basis, `energy` 1: conflict projection in all directions | 5.83 | 8.07 |
| **`gram="updates"`: the data-free default** | **3.76** | **4.31** |
| the same, `D_k'D_k` not squared, rho .15, .3 | 4.18, 4.35 | 5.02, 4.85 |
| the same, `rescale` none | 3.83 | 4.51 |
| the same, conflict projection in all directions | 4.98 | 4.95 |
| the same, `energy` basis at 98 %, residual dropped | 3.93 | 4.45 |
| the same, hard gate in all directions | 5.68 | 5.48 |
| the same, `pivot_cosine` scores, T .1 | 4.16 | 4.50 |
| RegMean, rho .9 | 3.20 | 3.71 |
| `gram="own"`, else defaults | 3.19 | 3.71 |
| **`gram="merged"`: the calibrated default** | **3.15** | **3.64** |
| the same, rho .98 | 3.20 | 3.76 |
| the same, conflict projection in all directions | 3.79 | 3.86 |

So the metric is what matters, with data and without. No filter helped in it: the wider it acts, the more it costs.
The default is therefore the narrow one: `cross` keeps only directions that experts have in common (one a layer in the
guessed metric), the residual is kept, and a conflict projection there changed nothing. No scores beat uniform weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.errors import InputError
from pivotjax.merging import diagnostics, spectral
from pivotjax.merging.calibration import Calibration, checked_gram, own_grams
from pivotjax.merging.registry import Count, Fraction, Merged, NotNegative, Positive, Share, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Updates, batched, leaves_from

Array = jax.Array
Residual = Literal["drop", "keep_mean", "keep"]
Metric = Literal["own", "pooled"]
Gate = Literal["none", "hard", "soft"]
Rescale = Literal["none", "expert_norm"]
Scores = Literal["uniform", "energy", "pivot_cosine", "loss_gain"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("energy", "tau", "gamma", "temperature", "rho"),
    meta_fields=("basis", "rank", "residual", "metric", "conflict", "gate", "scores", "rescale"),
)
@dataclass(frozen=True)
class _Knobs:
    """The options of `pivot` that jitted code needs: words are static, numbers are traced."""

    basis: spectral.Basis
    rank: int | None
    residual: Residual
    metric: Metric
    conflict: bool
    gate: Gate
    scores: Scores
    rescale: Rescale
    energy: float
    tau: float
    gamma: float
    temperature: float
    rho: float


@method(
    "pivot",
    family="shared space",
    source="PivotMerge (arXiv 2604.22823): components [read], formulas [ours]",
    needs=("base",),
    laws={
        "identical": {},
        "order": {},
        "homogeneous": {},
        "average": {"gram": "none", "energy": 1.0, "conflict": False, "rescale": "none"},
        "single": {},
        "zero": {},
    },
)
def pivot(
    updates: Updates,
    *,
    calibration: Calibration | None = None,
    basis: spectral.Basis = "cross",
    energy: Fraction = 0.9,
    rank: Count | None = None,
    residual: Residual = "keep",
    conflict: bool = True,
    gate: Gate = "none",
    tau: Share | None = None,
    gamma: NotNegative = 1.0,
    scores: Scores = "uniform",
    temperature: Positive = 1.0,
    gram: Literal["auto", "none", "updates", "own", "merged"] = "auto",
    metric: Metric = "pooled",
    rho: Share | None = None,
    rescale: Rescale = "expert_norm",
    scale: float = 1.0,
) -> Merged:
    """Decomposes updates in a shared space, filters conflicts and merges layer by layer.

    Args:
        updates: K experts measured from their base. One expert alone is not filtered.
        calibration: needed by `gram` `own` and `merged`, and by `scores="loss_gain"`.
        basis: which directions count as shared: `energy`, the largest together; `cross`, the most in common.
        energy: share of the spectrum that the shared space must reach.
        rank: a fixed number of directions instead.
        residual: what lies outside the space: `drop` it, keep its mean over the experts, or keep each expert's own.
        conflict: remove from `c_ki` its component along the mean of the others where they point against each other.
        gate: on the consensus `a_i = |s_i| / mean_k |c_ki|` in [0, 1]: `hard` keeps `a_i >= tau`, `soft` multiplies by
            `a_i^gamma`.
        tau: threshold of the hard gate; None: `1 / sqrt(K)`, the consensus of unrelated experts.
        gamma: exponent of the soft gate.
        scores: what weighs experts a layer: `uniform`; `energy`, the share of `E_k` inside the shared space;
            `pivot_cosine`, its cosine to the mean of the others; `loss_gain`, by how much the caption loss (all
            domains) drops when the layer of the plain average is replaced by expert k's.
        temperature: T of the softmax over experts.
        gram: where the input statistics come from (see the module): nowhere, the updates, calibration data on the
            experts' own layers, or on the layers already merged; `auto`: `merged` with calibration, `updates` without.
        metric: `E_k` by the mean of the experts' Gram matrices, or by each expert's own (then effects of different
            experts are compared in different coordinates, and identical experts seem to differ).
        rho: factor on the off-diagonal entries of each Gram matrix; None: .9 with data, .15 with the guess.
        rescale: `expert_norm`: f brings a layer's mean filtered update to the mean norm of the experts' updates (an
            average of K unrelated updates is `1 / sqrt(K)` too short); `none`: f = 1.
        scale: lambda, on the merged update as a whole, after all layers are solved.
    """
    if gram == "auto":
        gram = "updates" if calibration is None else "merged"
    if calibration is None and (gram in ("own", "merged") or scores == "loss_gain"):
        what = f"gram={gram!r}" if gram in ("own", "merged") else "scores='loss_gain'"
        raise InputError(f"pivot with {what} needs calibration data: give it, or leave that option at its default")
    if rho is None:
        rho = 0.15 if gram == "updates" else 0.9
    experts = len(updates.names)
    if experts == 1:
        energy, rank = 1.0, None
    knobs = _Knobs(
        basis, rank, residual, metric, conflict, gate, scores, rescale,
        energy, experts**-0.5 if tau is None else tau, gamma, temperature, rho,
    )  # fmt: skip
    gains = _loss_gains(updates, calibration) if scores == "loss_gain" else _no_gains(updates)
    if gram == "none":
        merged = _merge_free(_layers(updates), gains, knobs)
    elif gram == "merged":
        merged = _merge_in_order(updates, calibration, gains, knobs)
    else:
        grams = own_grams(calibration, updates) if gram == "own" else _guessed_grams(_layers(updates))
        merged = _merge_own(_layers(updates), grams, gains, knobs)
    matrices = {name: result.pop("merged") for name, result in merged.items()}
    leaves = [scale * leaf for leaf in _leaves(updates, matrices)]
    return Merged(leaves, diagnostics.shared_space(updates, merged), {"gram": gram, "rho": rho})


Layers = dict[str, Array]  # [K, n, ...] a layer
Facts = dict[str, Array]  # [n, ...] each


@jax.jit
def _layers(updates: Updates) -> Layers:
    return updates.layers


@jax.jit
def _leaves(updates: Updates, matrices: dict[str, Array]) -> list[Array]:
    return leaves_from(updates.layout, matrices, updates.others_mean())


@jax.jit
def _merge_free(layers: Layers, gains: Layers, knobs: _Knobs) -> dict[str, Facts]:
    """`{layer: merged update [n, d_out, d_in] and facts}` of updates `[K, n, d_out, d_in]`."""

    def one(update: Array, gain: Array) -> Facts:
        filtered, facts = _filter(update, knobs)
        alpha = _layer_weights(update, facts, gain, knobs)
        merged, factor = _rescaled(_weighted(alpha, filtered), update, knobs)
        return facts | {"merged": merged, "weights": alpha.T, "factor": factor}

    return batched(one, layers, gains)


@jax.jit
def _merge_own(layers: Layers, grams: Layers, gains: Layers, knobs: _Knobs) -> dict[str, Facts]:
    """The same with Gram matrices `[K, n, d_in, d_in]` of each expert's own inputs."""

    def one(update: Array, gram: Array, gain: Array) -> Facts:
        filtered, alpha, facts = _filter_in_metric(update, spectral.shrink(gram, knobs.rho), gain, knobs)
        return _fit(filtered, matmul(filtered, gram), gram, update, alpha, facts, knobs)

    return batched(one, layers, grams, gains)


@jax.jit
def _guessed_grams(layers: Layers) -> Layers:
    """`(D_k'D_k)^2`, scaled to a mean diagonal of 1: a guess of each expert's input Gram matrices from its updates."""

    def one(update: Array) -> Array:
        moment = _unit_diagonal(matmul(transpose(update), update))
        return _unit_diagonal(matmul(moment, moment))

    return {name: one(update) for name, update in layers.items()}


def _unit_diagonal(moment: Array) -> Array:
    return moment / _nonzero(jnp.diagonal(moment, axis1=-2, axis2=-1).mean(-1))[..., None, None]


@jax.jit
def _merge_student(
    update: Array, base: Array, gram: Array, student: Array, cross: Array, gain: Array, knobs: _Knobs
) -> Facts:
    """One layer of `gram="merged"`: `gram` is X'X, `student` is H'H and `cross` is X'H, each `[K, 1, d_in, d_in]`."""
    filtered, alpha, facts = _filter_in_metric(update, spectral.shrink(gram, knobs.rho), gain, knobs)
    target = matmul(base + filtered, cross) - matmul(base, student)
    return _fit(filtered, target, student, update, alpha, facts, knobs)


def _fit(
    filtered: Array, target: Array, gram: Array, update: Array, alpha: Array, facts: Facts, knobs: _Knobs
) -> Facts:
    """The merged update of the module's objective: `target = Y_k'H_k`, `gram = H_k'H_k`, each `[K, n, ...]`."""
    mean, factor = _rescaled(_weighted(alpha, filtered), update, knobs)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None, :]
    pull = factor[:, None, None] * filtered * diagonal
    moment = _weighted(alpha, knobs.rho * target + (1 - knobs.rho) * pull)
    merged = spectral.fit(moment, _weighted(alpha, spectral.shrink(gram, knobs.rho)), mean)
    return facts | {"merged": merged, "weights": alpha.T, "factor": factor}


def _merge_in_order(
    updates: Updates, calibration: Calibration, gains: dict[str, Array], knobs: _Knobs
) -> dict[str, Facts]:
    """`gram="merged"`: each layer is solved on the inputs that the layers merged before it produce."""
    for layer in updates.layout.layers:
        if layer.lead:
            raise InputError(f"pivot with gram='merged' merges layer after layer, but {layer.name!r} is a stack of "
                             f"{layer.count}: use gram='own'")
    grams, base = own_grams(calibration, updates), updates.base_layers
    experts, layers, results = updates.tree(updates.weights), _layers(updates), {}
    for layer in updates.layout.layers:
        name = layer.name
        student = _student(updates, results)
        pair = calibration.cross_grams(experts, student, name)
        h, s = (checked_gram(moment, layer, (len(updates.names),), updates) for moment in pair)
        results[name] = _merge_student(layers[name], base[name], grams[name], h, s, gains[name], knobs)
    return results


def _student(updates: Updates, results: dict[str, Facts]):
    """The projector merged so far: layers not merged yet are the base's."""
    merged = {name: results[name]["merged"] if name in results else jnp.zeros_like(base)
              for name, base in updates.base_layers.items()}
    return updates.parameters(_leaves(updates, merged))


def _filter_in_metric(
    update: Array, gram: Array, gain: Array, knobs: _Knobs
) -> tuple[Array, Array, dict[str, Array]]:
    """Filters `E_k = D_k G_k^(1/2)`; returns the filtered updates `D~_k`, the weights and the facts."""
    lens = gram if knobs.metric == "own" else gram.mean(0, keepdims=True)
    root, inverse = spectral.root(lens)
    effects = matmul(update, root)
    filtered, facts = _filter(effects, knobs)
    alpha = _layer_weights(effects, facts, gain, knobs)
    # Only the change goes back through the inverse: what the filter leaves alone stays exact, inputs never seen too.
    return update + matmul(filtered - effects, inverse), alpha, facts


def _filter(effects: Array, knobs: _Knobs) -> tuple[Array, dict[str, Array]]:
    """Steps 1 to 3 on `[K, n, d_out, d_in]`: filtered effects of the same shape, and facts with leading n."""
    spectrum, basis = spectral.shared_space(effects, knobs.basis)
    kept = spectral.leading(spectrum, knobs.energy, knobs.rank)
    coefficients = jnp.where(kept[..., None], matmul(transpose(basis), effects), 0)
    rest = effects - matmul(basis, coefficients)
    energy = _norm(coefficients, (-1, -2)) ** 2 / _nonzero(_norm(effects, (-1, -2)) ** 2)
    if knobs.conflict and effects.shape[0] > 1:
        coefficients = _without_conflicts(coefficients)
    consensus = _norm(coefficients.mean(0), -1) / _nonzero(_norm(coefficients, -1).mean(0))
    if knobs.gate == "hard":
        coefficients = jnp.where((consensus >= knobs.tau)[..., None], coefficients, 0)
    if knobs.gate == "soft":
        coefficients = coefficients * (consensus**knobs.gamma)[..., None]
    filtered = matmul(basis, coefficients)
    if knobs.residual == "keep":
        filtered = filtered + rest
    if knobs.residual == "keep_mean":
        filtered = filtered + rest.mean(0)
    return filtered, {"spectrum": spectrum, "kept": kept, "consensus": consensus, "energy": energy.T}


def _without_conflicts(coefficients: Array) -> Array:
    """Removes from `c_ki` its component along the mean of the others where their inner product is negative."""
    others = (coefficients.sum(0) - coefficients) / (coefficients.shape[0] - 1)
    product = (coefficients * others).sum(-1, keepdims=True)
    square = _nonzero((others * others).sum(-1, keepdims=True))
    return coefficients - jnp.minimum(product, 0) / square * others


def _layer_weights(effects: Array, facts: dict[str, Array], gain: Array, knobs: _Knobs) -> Array:
    """`alpha` `[K, n]`; adds the scores to the facts."""
    score = {"energy": lambda: facts["energy"].T, "pivot_cosine": lambda: _pivot_cosine(effects)}
    facts["scores"] = score.get(knobs.scores, lambda: gain)().T
    return jax.nn.softmax(facts["scores"].T / knobs.temperature, axis=0)


def _pivot_cosine(effects: Array) -> Array:
    """Cosine of each expert's effect to the mean of the others', `[K, n]`."""
    others = effects.sum(0) - effects
    product = (effects * others).sum((-1, -2))
    return product / _nonzero(_norm(effects, (-1, -2)) * _norm(others, (-1, -2)))


def _rescaled(mean: Array, update: Array, knobs: _Knobs) -> tuple[Array, Array]:
    """`[n, d_out, d_in]` brought to the experts' mean norm if asked, and the factors `[n]`."""
    factor = jnp.ones(mean.shape[0], mean.dtype)
    if knobs.rescale == "expert_norm":
        length = _norm(mean, (-1, -2))
        factor = jnp.where(length > 0, _norm(update, (-1, -2)).mean(0) / _nonzero(length), 1)
    return factor[:, None, None] * mean, factor


def _loss_gains(updates: Updates, calibration: Calibration) -> dict[str, Array]:
    """`{layer: [K, n]}`: caption loss of the plain average minus that with one layer replaced by expert k's."""
    layers = _layers(updates)
    mean = {name: matrix.mean(0) for name, matrix in layers.items()}
    candidates = [_leaves(updates, mean)]
    for name, matrix in layers.items():
        for k in range(matrix.shape[0]):
            for i in range(matrix.shape[1]):
                swapped = mean | {name: mean[name].at[i].set(matrix[k, i])}
                candidates.append(_leaves(updates, swapped))
    losses = calibration.loss(jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(updates.parameters, candidates)))
    if losses.shape != (len(candidates),) or not bool(jnp.isfinite(losses).all()):
        raise InputError(f"calibration: caption losses of {len(candidates)} projectors must be as many finite numbers")
    gains, start = {}, 1
    for name, matrix in layers.items():
        count = matrix.shape[0] * matrix.shape[1]
        gains[name] = (losses[0] - losses[start : start + count]).reshape(matrix.shape[:2]).astype(matrix.dtype)
        start += count
    return gains


def _no_gains(updates: Updates) -> dict[str, Array]:
    return {name: jnp.zeros(matrix.shape[:2], matrix.dtype) for name, matrix in _layers(updates).items()}


def _weighted(alpha: Array, stacked: Array) -> Array:
    """`sum_k alpha[k] stacked[k]`: `[K, n]`, `[K, n, ...]` -> `[n, ...]`."""
    return jnp.einsum("kn,knij->nij", alpha, stacked, precision="highest")


def _norm(x: Array, axis) -> Array:
    return jnp.sqrt((x * x).sum(axis))


def _nonzero(x: Array) -> Array:
    """`x`, or 1 where it is 0: for quotients whose numerator is 0 there too."""
    return jnp.where(x == 0, 1, x)
