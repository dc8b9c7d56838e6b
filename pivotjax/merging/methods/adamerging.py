"""AdaMerging: merging coefficients learned on calibration data."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from pivotjax.errors import InputError
from pivotjax.merging.calibration import Calibration, Objective, pooled_gradient
from pivotjax.merging.diagnostics import by_expert
from pivotjax.merging.registry import Count, Merged, Positive, method
from pivotjax.merging.updates import Array, Layout, Updates, is_traced
from pivotjax.progress import Bar

PyTree = Any
Lambdas = Array | dict[str, Array]  # `[K]` for all leaves, or `{unit: [K, *lead]}`


@method(
    "adamerging",
    family="calibrated",
    source="W^l = W0^l + sum_k lambda_k^l D_k^l, lambda learned by Adam on a loss of the merge (arXiv 2310.02575)",
    needs=("base", "calibration"),
    scope="model",
    laws={"order": {}, "zero": {}, "idle": {}},
)
def adamerging(
    updates: Updates,
    *,
    calibration: Calibration,
    objective: Objective = "caption",
    per: Literal["layer", "task"] = "layer",
    init: float = 0.3,
    lr: Positive = 1e-3,
    steps: Count = 500,
    scale: float = 1.0,
) -> Merged:
    """Task arithmetic with a coefficient for each expert and layer, learned on calibration data.

    The merge is linear in the coefficients, so `d loss / d lambda_k^l = <d loss / d W^l, D_k^l>`: the calibration
    differentiates the model with respect to one projector, whatever K is. A step takes the gradient over all
    calibration pairs (the authors draw 16 a task). Coefficients are free; the authors' code cuts them to [0, 1].

    A coefficient belongs to a layer's weight and bias together, one for each layer of a scanned stack; a leaf outside
    the layers (a norm) has its own. The report holds the `lambdas` of each layer and, in `facts`, the `losses` before
    each step.

    Args:
        updates: K experts measured from their base.
        calibration: gives the loss and its gradient. One that works on the host refuses to be traced; any other is
            traced once and run in a loop.
        objective: `caption`, the loss of the calibration captions; `entropy`, that of the model's own predictions, the
            paper's (it needs no captions where a classifier is merged; here captions still give the positions).
        per: a coefficient for each expert and `layer`, or one for each expert (the paper's task-wise form).
        init: of all coefficients (the paper's).
        lr: of Adam, betas .9 and .999 (the authors' code).
        steps: of Adam (the authors' code). Where a step is slow, fewer larger ones: on three experts through
            SmolLM2-135M the caption loss settled within 10 steps at lr .05, on which the entropy oscillates.
        scale: factor on the merged update after the coefficients are learned.
    """
    lambdas = _initial(updates, init, per)
    state = (lambdas, optax.adam(lr).init(lambdas))
    step = partial(_step, updates, calibration, objective, lr)
    if is_traced(updates):
        (lambdas, _), losses = jax.lax.scan(step, state, length=steps)
    else:
        lambdas, losses = _learn(step, state, steps)
    facts = {label: {"lambdas": by_expert(updates, row)} for label, row in _rows(updates.layout, lambdas).items()}
    return Merged(_merged(updates, lambdas, scale), facts, facts={"losses": losses})


def _learn(step, state: tuple[Lambdas, optax.OptState], steps: int) -> tuple[Lambdas, Array]:
    """The loop on the host: it shows how it goes, and stops where the loss is lost."""
    losses = []
    with Bar(steps, "adamerging", unit="step") as bar:
        for number in range(steps):
            state, loss = step(state)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise InputError(f"adamerging: the calibration loss is not finite at step {number}; use a smaller lr")
            bar.update(note=f"loss {losses[-1]:.4f}")
    return state[0], jnp.array(losses)


def _step(updates: Updates, calibration: Calibration, objective: Objective, lr: float, state, _=None):
    """One step of Adam: `((lambdas, its state), loss before the step)`."""
    lambdas, moments = state
    losses, gradients = pooled_gradient(calibration, updates, _candidate(updates, lambdas), objective)
    return _stepped(updates, lambdas, moments, gradients, lr), losses[0]


@jax.jit
def _candidate(updates: Updates, lambdas: Lambdas) -> PyTree:
    """The merge's parameters, as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[None], updates.parameters(_merged(updates, lambdas)))


@jax.jit
def _stepped(updates: Updates, lambdas: Lambdas, moments: optax.OptState, gradients: list[Array], lr: float):
    _, transposed = jax.vjp(partial(_merged, updates), lambdas)
    (slopes,) = transposed([gradient[0].astype(updates.dtype) for gradient in gradients])
    change, moments = optax.adam(lr).update(slopes, moments)
    return optax.apply_updates(lambdas, change), moments


@jax.jit
def _merged(updates: Updates, lambdas: Lambdas, scale: float = 1.0) -> list[Array]:
    """`scale * sum_k lambda_k D_k`, a leaf each."""
    leaves = dict(enumerate(updates.stacked))
    for unit, indices in _units(updates.layout).items():
        own = lambdas[unit] if isinstance(lambdas, dict) else lambdas
        for i in indices:
            spread = own.reshape(*own.shape, *[1] * (leaves[i].ndim - own.ndim))
            leaves[i] = scale * sum(one * d for one, d in zip(spread, leaves[i]))
    return [leaves[i] for i in range(len(leaves))]


def _units(layout: Layout) -> dict[str, tuple[int, ...]]:
    """What shares a coefficient: `{name: leaf indices}`, a layer's weight and bias, or a leaf outside the layers."""
    layers = {layer.name: tuple(i for i in (layer.weight, layer.bias) if i is not None) for layer in layout.layers}
    return layers | {layout.paths[i]: (i,) for i in layout.others}


def _initial(updates: Updates, value: float, per: Literal["layer", "task"]) -> Lambdas:
    experts = len(updates.names)
    if per == "task":
        return jnp.full(experts, value, updates.dtype)
    leads = {layer.name: layer.lead for layer in updates.layout.layers}
    return {unit: jnp.full((experts, *leads.get(unit, ())), value, updates.dtype) for unit in _units(updates.layout)}


def _rows(layout: Layout, lambdas: Lambdas) -> dict[str, Array]:
    """Coefficients `[K]` by the names that reports use."""
    rows = {}
    labels = {layer.name: layer.labels() for layer in layout.layers}
    for unit in _units(layout):
        names = labels.get(unit, (unit,))
        own = lambdas[unit] if isinstance(lambdas, dict) else lambdas[:, None].repeat(len(names), 1)
        rows |= dict(zip(names, own.reshape(own.shape[0], -1).T))
    return rows
