"""One training step of K experts over one frozen LLM: a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pivotjax.models import projector, vlm


class TrainState(NamedTuple):
    """What training changes, and all that a checkpoint of it holds."""

    step: Int[Array, ""]
    params: projector.Params  # leading axis K on every leaf
    opt_state: Any
    alive: Bool[Array, " K"]  # False from the step on in which an expert's loss or gradient was not finite


class Metrics(NamedTuple):
    """Of one step, before its update; each [K]."""

    loss: Float[Array, " K"]
    gradient_norm: Float[Array, " K"]
    alive: Bool[Array, " K"]


def init_state(w0: projector.Params, experts: int, optimizer: optax.GradientTransformation) -> TrainState:
    """K copies of one W0, so that their updates can be compared."""
    params = projector.stack([w0] * experts)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.ones(experts, bool))


def expert_losses(
    params: projector.Params,
    language_def: nnx.GraphDef,
    frozen: Any,
    batch: dict[str, jax.Array],
    *,
    first_position: int,
    remat: bool,
) -> Float[Array, " K"]:
    """Mean caption loss a token of each expert on its own part of the batch `[K, B, ...]`.

    The K x B samples pass through the LLM as one batch, so its weights are read once whatever K is, and no sample
    influences another expert's loss or gradient.
    """
    experts, size = batch["tokens"].shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(experts * size, *a.shape[2:]), batch)
    visual = projector.apply_stacked(params, batch["features"])
    nll = vlm.caption_nll(
        nnx.merge(language_def, frozen),
        flat["tokens"],
        visual.reshape(experts * size, *visual.shape[2:]),
        flat["targets"],
        flat["weights"],
        first_position,
        remat,
    )
    tokens = batch["weights"].reshape(experts, -1).sum(axis=1)
    return nll.reshape(experts, size).sum(axis=1) / jnp.maximum(tokens, 1)


def make_step(
    language_def: nnx.GraphDef, optimizer: optax.GradientTransformation, *, first_position: int, remat: bool = False
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`; jit it with the first argument donated.

    An expert whose loss or gradient is not finite keeps its last finite parameters from then on; the others go on.
    """

    def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        def total(params):
            losses = expert_losses(params, language_def, frozen, batch, first_position=first_position, remat=remat)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, has_aux=True)(state.params)
        norms = jax.vmap(optax.global_norm)(gradients)
        alive = state.alive & jnp.isfinite(losses) & jnp.isfinite(norms)

        def where_alive(new, old):
            return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            state.step + 1,
            jax.tree.map(where_alive, params, state.params),
            jax.tree.map(where_alive, opt_state, state.opt_state),
            alive,
        )
        return new, Metrics(losses, norms, alive)

    return step
