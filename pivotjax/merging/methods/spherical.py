"""Merges on the sphere: experts as directions, between which one moves along arcs; their lengths are averaged.

All of them treat a tensor as one vector (`nuslerp` also each row or column of a matrix) and take raw vectors, whose
coefficients they compute from inner products: each expert is read twice, however many steps an iteration takes.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pivotjax.errors import InputError
from pivotjax.merging.elementwise import On, divide, each, inner, input_axes, total, vectors, weighted
from pivotjax.merging.methods.average import expert_weights
from pivotjax.merging.registry import Count, ExpertValues, Merged, Positive, Share, method
from pivotjax.merging.updates import Array, Updates


@method(
    "slerp",
    family="spherical",
    source="[sin((1 - t) a) W_1 + sin(t a) W_2] / sin(a), a the angle between W_1 and W_2 (Shoemake 1985; mergekit)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {"on": "updates"}, "zero": {}},
)
def slerp(updates: Updates, *, t: Share = 0.5, on: On = "weights", scale: float = 1.0) -> Merged:
    """Spherical interpolation between exactly two experts, tensor by tensor.

    The angle is that of the directions, the vectors that are interpolated are the raw ones (for vectors of one length
    the usual formula). Nearly parallel or opposite vectors (|cos| > .9995) are interpolated linearly; a vector of 0
    counts as orthogonal to the other.

    Args:
        updates: two experts, in order.
        t: where to stop: 0 the first expert, 1 the second.
        on: `weights` (no base is needed), or the updates from the base.
        scale: factor on the merged update; other values than 1 need a base.
    """
    _two(updates, "slerp")
    _check(updates, on, scale)
    return Merged(_slerp(updates, t, scale, on))


@partial(jax.jit, static_argnums=3)
def _slerp(updates: Updates, t: float, scale: float, on: On) -> list[Array]:
    def one(a: Array, b: Array) -> Array:
        cosine = _cosine(total(a * a), total(b * b), total(a * b))
        return _interpolate(a, b, t, cosine, jnp.abs(cosine) > 0.9995)

    return _as_updates(updates, [one(*leaf) for leaf in each(updates, on)], on, scale)


@method(
    "nuslerp",
    family="spherical",
    source="spherical interpolation of D_1 and D_2 at t = w_2 / (w_1 + w_2) (mergekit)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "zero": {}},
)
def nuslerp(
    updates: Updates,
    *,
    weights: ExpertValues | None = None,
    along: Literal["tensor", "outputs", "inputs"] = "tensor",
    scale: float = 1.0,
) -> Merged:
    """Spherical interpolation between the updates of exactly two experts, or their weights where there is no base.

    As `slerp`, but only vectors that are parallel or opposite to rounding are interpolated linearly, and the whole need
    not be one vector.

    Args:
        updates: two experts; with a base their updates are interpolated, without one their weights.
        weights: each expert's share by name, divided by their sum; None, or a sum of 0: half each.
        along: what counts as a vector: the whole tensor; each output's row of a matrix; each input's column. A 1-D
            tensor is one vector.
        scale: factor on the merged update; other values than 1 need a base.
    """
    _two(updates, "nuslerp")
    _check(updates, "updates" if updates.has_base else "weights", scale)
    first, second = expert_weights(updates, weights, normalize=False)
    t = jnp.where(jnp.abs(first + second) < 1e-6, 0.5, divide(second, first + second))
    flat = [] if along == "tensor" else vectors(updates.layout)
    return Merged(_nuslerp(updates, t, scale, along),
                  exceptions=dict.fromkeys(flat, "interpolated as one vector: not a matrix"))


@partial(jax.jit, static_argnums=3)
def _nuslerp(updates: Updates, t: Array, scale: float, along: str) -> list[Array]:
    def one(a: Array, b: Array, inputs: int) -> Array:
        def summed(x: Array) -> Array:
            if along == "tensor" or x.ndim < 2:
                return total(x)
            return x.sum(inputs if along == "outputs" else -3 - inputs, keepdims=True)  # the other of the last two

        cosine = _cosine(summed(a * a), summed(b * b), summed(a * b))
        return _interpolate(a, b, t, cosine, 1 - jnp.square(cosine) <= 1e-16)

    leaves = zip(each(updates), input_axes(updates.layout))
    return [scale * one(*leaf, axis) for leaf, axis in leaves]


@method(
    "multislerp",
    family="spherical",
    source="|m|^-1 m * sum_k w_k |D_k|, m = sum_k w_k D_k / |D_k| (barycentre on the sphere, goddard.blog; mergekit)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def multislerp(
    updates: Updates, *, weights: ExpertValues | None = None, normalize: bool = True, scale: float = 1.0
) -> Merged:
    """The mean direction of the updates (of the weights where there is no base), as long as they are on average.

    Defined as a step in the plane that touches the sphere at the mean direction m: the weighted sum of the directions'
    projections onto that plane. As m is the weighted sum of those directions, the step is 0 and the result m itself.

    Args:
        updates: K experts; with a base their updates are merged, without one their weights.
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the weights by their sum. False: the lengths are summed with the weights as they are.
        scale: factor on the merged update; other values than 1 need a base.

    Where the weighted directions cancel (|m| < 1e-8) there is no mean direction and the result is `sum_k w_k D_k`. An
    update of 0 has no direction; it counts in the mean length.
    """
    _check(updates, "updates" if updates.has_base else "weights", scale)
    return Merged(_multislerp(updates, expert_weights(updates, weights, normalize), scale))


@jax.jit
def _multislerp(updates: Updates, weight: Array, scale: float) -> list[Array]:
    def one(leaf: list[Array]) -> Array:
        norms = jnp.sqrt(jnp.stack([total(jnp.square(d)) for d in leaf]))
        share = weight.astype(norms.dtype)
        direction = jnp.where(norms > 0, divide(share, norms), 0)
        size = jnp.sqrt(total(jnp.square(sum(weighted(leaf, direction)))))
        return sum(weighted(leaf, jnp.where(size < 1e-8, share, divide(direction, size) * (share @ norms))))

    return [scale * one(leaf) for leaf in each(updates)]


@method(
    "karcher",
    family="spherical",
    source="sum_k w_k |W_k| * the Riemannian mean of W_k / |W_k| on the sphere: m <- exp_m(sum_k w_k log_m(u_k)) "
    "(arXiv 2603.04972; mergekit)",
    scope="tensor",
    laws={"identical": {}, "order": {}, "homogeneous": {"on": "updates"}, "single": {}, "zero": {}},
)
def karcher(
    updates: Updates,
    *,
    weights: ExpertValues | None = None,
    iterations: Count = 10,
    tolerance: Positive = 1e-5,
    on: On = "weights",
    scale: float = 1.0,
) -> Merged:
    """The point on the sphere with the least mean square angle to the experts, as long as they are on average.

    Starts at the normalised weighted mean of the directions, or at the first expert's where that mean is shorter than
    the tolerance, and stops after `iterations` steps or before one that is shorter than the tolerance.

    Args:
        updates: K experts.
        weights: each expert's share by name, divided by their sum; None: equal shares.
        iterations: most steps.
        tolerance: see above; also, a vector no longer than this has no direction and counts in the mean length only.
        on: `weights` (no base is needed), or the updates from the base.
        scale: factor on the merged update; other values than 1 need a base.

    Directions opposite to the current mean have no defined arc to it and are left out of a step.
    """
    _check(updates, on, scale)
    weight = expert_weights(updates, weights, normalize=True)
    return Merged(_karcher(updates, weight, iterations, tolerance, scale, on))


@partial(jax.jit, static_argnums=5)
def _karcher(
    updates: Updates, weight: Array, iterations: int, tolerance: float, scale: float, on: On
) -> list[Array]:
    def one(leaf: list[Array]) -> Array:
        return sum(weighted(leaf, _mean_direction(inner(leaf), weight, iterations, tolerance)))

    return _as_updates(updates, [one(leaf) for leaf in each(updates, on)], on, scale)


def _mean_direction(products: Array, weight: Array, iterations: int, tolerance: float) -> Array:
    """The merged vector's coefficients `[K]` on the experts.

    All that the iteration meets is a combination of the unit vectors u_k, so it runs on K coefficients.

    Args:
        products: inner products `[K, K]` of the vectors.
        weight: `[K]`, summing to 1.
        iterations: see `karcher`.
        tolerance: see `karcher`.
    """
    norms = jnp.sqrt(jnp.diagonal(products))
    weight = weight.astype(norms.dtype)
    valid = norms > tolerance
    inverse = jnp.where(valid, divide(jnp.ones_like(norms), norms), 0)
    cosines = products * inverse[:, None] * inverse
    share = jnp.where(valid, weight, 0)
    share = divide(share, share.sum())

    def square(c: Array) -> Array:
        return jnp.maximum(c @ cosines @ c, 0)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mean, _, count = state
        dots = jnp.clip(cosines @ mean, -1, 1)
        angles = jnp.arccos(dots)
        sines = jnp.sqrt(1 - jnp.square(dots))
        arcs = share * jnp.where(sines > 0, divide(angles, sines), dots > 0)
        tangent = arcs - (arcs @ dots) * mean
        size = jnp.sqrt(square(tangent))
        moved = jnp.cos(size) * mean + jnp.sinc(size / jnp.pi) * tangent
        # Below the rounding of the inner products a step's length is unknown, the step itself is not: it is taken.
        rounding = 4 * jnp.finfo(size.dtype).eps * jnp.square(jnp.abs(tangent).sum())
        done = square(tangent) + rounding < tolerance**2
        return jnp.where(done, mean, divide(moved, jnp.sqrt(square(moved)))), done, count + 1

    size = jnp.sqrt(square(share))
    first = jnp.zeros_like(share).at[jnp.argmax(valid)].set(1)
    start = jnp.where(size < tolerance, first, divide(share, size))
    mean, _, _ = jax.lax.while_loop(lambda s: (s[2] < iterations) & ~s[1], step, (start, jnp.array(False), 0))
    return mean * inverse * (weight @ norms)


def _cosine(aa: Array, bb: Array, ab: Array) -> Array:
    return jnp.clip(divide(ab, jnp.sqrt(aa) * jnp.sqrt(bb)), -1, 1)


def _interpolate(a: Array, b: Array, t: Array, cosine: Array, parallel: Array) -> Array:
    """Along the arc where not `parallel`, else along the chord."""
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))
    first = jnp.where(parallel, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    second = jnp.where(parallel, t, jnp.sin(t * angle) / jnp.sin(angle))
    return first.astype(a.dtype) * a + second.astype(b.dtype) * b


def _as_updates(updates: Updates, leaves: list[Array], on: On, scale: float) -> list[Array]:
    if on == "weights":
        leaves = [leaf - base for leaf, base in zip(leaves, updates.base_leaves)]
    return [scale * leaf for leaf in leaves]


def _two(updates: Updates, name: str) -> None:
    if len(updates.names) != 2:
        raise InputError(f"merge method {name!r} interpolates between two experts, and here are {len(updates.names)}; "
                         "choose two, or 'multislerp' or 'karcher'")


def _check(updates: Updates, on: On, scale: float) -> None:
    if on == "updates" and not updates.has_base:
        raise InputError("on='updates' measures them from a base: give one, or choose on='weights'")
    if scale != 1 and not updates.has_base:
        raise InputError("scale is a factor on the update from a base: give a base, or leave scale at 1")
