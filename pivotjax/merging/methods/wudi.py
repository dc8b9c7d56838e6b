"""WUDI and its relatives: the merged update that disturbs every expert least on the expert's own row space.

An update is a sum of outer products of errors and inputs, so its rows stand for its inputs. All methods here minimise
`sum_k |(D - T_k) M_k'|^2 / |D_k|^2`, a least squares problem with the normal equations `D C = B`,
`C = sum_k A_k`, `B = sum_k T_k A_k`, `A_k = M_k'M_k / |D_k|^2`; they differ in the targets T_k, in what measures the
disturbance M_k, and in how far they go from a start `D_0`. Everything is computed for the difference to the start,
`D = D_0 + ...(B - D_0 C)`, so that rounding in C cannot touch what the start already has right.

An expert equal to the base is left out of C and B (its `|D_k|` is 0).
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from pivotjax.merging import spectral
from pivotjax.merging.methods.matrices import Facts, merge_kernels, merged, single_rank
from pivotjax.merging.registry import Count, Fraction, Merged, Positive, method
from pivotjax.merging.spectral import matmul, transpose
from pivotjax.merging.updates import Array, Updates


@method(
    "wudi",
    family="spectral",
    source="B C^+, C = sum_k D_k'D_k / |D_k|^2, B = sum_k D_k D_k'D_k / |D_k|^2 (WUDI, arXiv 2503.08099; closed form "
    "as in arXiv 2606.07289)",
    needs=("base",),
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def wudi(updates: Updates, *, steps: Count | None = None, rate: Positive = 1e-5, scale: float = 1.0) -> Merged:
    """The exact minimiser of WUDI's interference loss, or the paper's steps towards it.

    Vectors (biases too) are averaged. One expert alone is returned.

    Args:
        updates: K experts measured from their base.
        steps: None: the minimiser. Directions whose eigenvalue of C is below eps^(2/3) of the largest stay at the mean
            update: there the experts' own components are smaller than what rounding leaves of the solution. A number:
            the paper's procedure, so many steps of Adam from the sum of the updates (the paper takes 300).
        rate: Adam's step size; the paper's 1e-5 is meant for updates of fine-tuned models, which are small.
        scale: on the merged update.
    """
    return merged(updates, *_wudi(updates, scale, rate, steps))


@partial(jax.jit, static_argnums=3)
def _wudi(updates: Updates, scale: float, rate: float, steps: int | None) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        start = spectral.mean(update) if steps is None else spectral.summed(update)
        gram, missing = _equations(update, update / _norms(update), start)
        if steps is None:
            return start + matmul(missing, spectral.pinv(gram, _rounding(gram))), {}
        return start + _descend(optax.adam(rate), steps, gram, missing), {}

    return merge_kernels(updates, one, scale)


@method(
    "swudi",
    family="spectral",
    source="D_0 + (D* - D_0) V f(L) V', D_0 = sum_k D_k, D* = wudi, C = V L V', f(l) = 1 - exp(-l t) on the leading "
    "eigenvalues, else 0 (SWUDI, arXiv 2606.07289)",
    needs=("base",),
    laws={"identical": {"time": 1e6, "keep": 1.0}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def swudi(updates: Updates, *, time: Positive = 300.0, keep: Fraction = 0.65, scale: float = 1.0) -> Merged:
    """The sum of the updates moved towards WUDI's minimiser, most where the experts' row spaces are strong.

    The filter is what gradient flow does in `time`, without its steps; it is 0 where C is only rounding (see `wudi`).
    Identical experts give `K D - (K - 1) D V f V'`, which is D only where f is 1. One expert alone is returned. Vectors
    (biases too) are averaged.

    Args:
        updates: K experts measured from their base.
        time: t of the filter; 300 as in the paper.
        keep: share of the d_in eigenvectors of C that are filtered, the largest ones, rounded up; the others stay at
            the sum. .65 is the released code's default (it takes .85 for whole language models); 1: no truncation.
        scale: on the merged update; a sum of K updates, of which less than all is corrected, is long.
    """
    return merged(updates, *_swudi(updates, scale, time, keep))


@partial(jax.jit, static_argnums=3)
def _swudi(updates: Updates, scale: float, time: float, keep: float) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        start = spectral.summed(update)
        gram, missing = _equations(update, update / _norms(update), start)
        rank = math.ceil(keep * gram.shape[-1] - 1e-6)
        values, vectors = spectral.eigh(gram)
        known = values > _rounding(gram) * values[..., :1]
        moved = jnp.where(known, -jnp.expm1(-time * values), 0)[..., :rank]
        share = (moved / jnp.where(known, values, 1)[..., :rank])[..., None, :]
        vectors = vectors[..., :rank]
        return start + matmul(matmul(missing, vectors) * share, transpose(vectors)), {"filter_mean": moved.mean(-1)}

    return merge_kernels(updates, one, scale)


@method(
    "optmerge",
    family="spectral",
    source="Adam on sum_k |(D - T_k) (S_k V_k')'|^2 / |D_k|^2, S_k V_k' leading triplets of D_k, T_k = mean + "
    "SVD_r(D_k - mean), r = min(m, n) / K (OptMerge, arXiv 2505.19892, as released)",
    needs=("base",),
    laws={"order": {}, "single": {}, "zero": {}},
)
def optmerge(
    updates: Updates,
    *,
    form: Literal["full", "lora"] = "full",
    rank: Count | None = None,
    steps: Count = 300,
    rate: Positive | None = None,
    scale: float = 1.0,
) -> Merged:
    """WUDI's loss with denoised targets, followed for a fixed number of steps.

    The step size is absolute: small updates move all the way, those of a projector that started from random weights
    hardly at all (raise `rate`). Vectors (biases too) are averaged. One expert alone is returned.

    Args:
        updates: K experts measured from their base.
        form: `full`, for full fine-tuning: targets as above, Adam from the sum of the updates. `lora`, the authors'
            form for LoRA: `T_k = SVD_r(D_k)`, gradient descent with momentum .9 from the mean.
        rank: r; None: min(m, n) / K rounded down, at least 1 (the authors').
        steps: 300 as in the authors' code.
        rate: step size; None: the authors', 1e-5 for `full`, 1e-4 for `lora`.
        scale: on the merged update.
    """
    rate = {"full": 1e-5, "lora": 1e-4}[form] if rate is None else rate
    return merged(updates, *_optmerge(updates, scale, rate, form, rank, steps))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _optmerge(
    updates: Updates, scale: float, rate: float, form: str, rank: int | None, steps: int
) -> tuple[list[Array], dict[str, Facts]]:
    def one(update: Array) -> tuple[Array, Facts]:
        leading = rank or single_rank(update.shape, len(update))
        mean = spectral.mean(update)
        centre, start = (mean, spectral.summed(update)) if form == "full" else (jnp.zeros_like(mean), mean)

        def denoised(d: Array) -> tuple[Array, Array]:
            """`T_k` and `S_k V_k'`."""
            u, sigma, v = spectral.svd(jnp.stack([d - centre, d]), leading)
            target = centre + matmul(u[0] * sigma[0][..., None, :], transpose(v[0]))
            return target, sigma[1][..., None] * transpose(v[1])

        targets, measures = jax.lax.map(denoised, update)
        gram, missing = _equations(targets, measures / _norms(update), start)
        optimizer = optax.adam(rate) if form == "full" else optax.sgd(rate, momentum=0.9)
        return start + _descend(optimizer, steps, gram, missing), {}

    return merge_kernels(updates, one, scale)


def _norms(update: Array) -> Array:
    """`|D_k|` as `[K, n, 1, 1]`; infinite for an update of 0, which then weighs nothing."""
    norms = jnp.sqrt(jnp.square(update).sum(-1).sum(-1))
    return jnp.where(norms > 0, norms, jnp.inf)[..., None, None]


def _equations(targets: Array, measures: Array, start: Array) -> tuple[Array, Array]:
    """`C = sum_k M_k'M_k` and `B - D_0 C = sum_k (T_k - D_0) M_k'M_k`, one expert at a time."""

    def add(so_far: tuple[Array, Array], expert: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        target, measure = expert
        gram = matmul(transpose(measure), measure)
        return (so_far[0] + gram, so_far[1] + matmul(target - start, gram)), None

    size = targets.shape[-1]
    nothing = jnp.zeros((*start.shape[:-2], size, size), start.dtype), jnp.zeros_like(start)
    return jax.lax.scan(add, nothing, (targets, measures))[0]


def _rounding(gram: Array) -> float:
    """Smallest eigenvalue of C, relative to the largest, that is used: eps^(2/3). An eigenvalue l leaves an error of
    about eps / l in the solution, where the experts' own components are about sqrt(l)."""
    return float(jnp.finfo(gram.dtype).eps) ** (2 / 3)


def _descend(optimizer: optax.GradientTransformation, steps: int, gram: Array, missing: Array) -> Array:
    """How far `steps` of the optimizer move from the start: the loss has the gradient `2 (moved C - (B - D_0 C))`."""

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        moved, memory = state
        change, memory = optimizer.update(2 * (matmul(moved, gram) - missing), memory)
        return (moved + change, memory), None

    nothing = jnp.zeros_like(missing)
    return jax.lax.scan(step, (nothing, optimizer.init(nothing)), None, length=steps)[0][0]
