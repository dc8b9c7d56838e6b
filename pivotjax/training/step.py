"""One training step of K experts over one frozen backbone: a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pivotjax.errors import InputError
from pivotjax.models import projector, vision, vlm
from pivotjax.models.language import Plan
from pivotjax.models.processors import Normalisation
from pivotjax.models.vision import Features
from pivotjax.training import losses
from pivotjax.training.attention import check_splash, splash
from pivotjax.training.optimizer import GuardConfig, TrainingConfig
from pivotjax.training.parallel import ROWS, Layout, fitting, shardings

Batch = dict[str, jax.Array]
_KEEP = 0.95  # of the running mean of the loss, at each step


class Network(NamedTuple):
    """The frozen networks without their weights; static under jit.

    Fields:
        language: the decoder.
        vision: the encoder, where batches bring images and not features.
        features, normalise: of the encoder, as `pivotjax.models.vision.Encoder` has them.
    """

    language: nnx.GraphDef
    vision: nnx.GraphDef | None = None
    features: Features = Features()
    normalise: Normalisation | None = None


class TrainState(NamedTuple):
    """What training changes, and all that a checkpoint of it holds."""

    step: Int[Array, ""]
    params: projector.Params  # leading axis K on every leaf
    opt_state: Any
    alive: Bool[Array, " K"]  # False from the step on in which an expert was retired
    loss_average: Float[Array, " K"]  # running mean over steps of finite loss; infinite before the first


class Metrics(NamedTuple):
    """Of one step, before its update; each [K]."""

    loss: Float[Array, " K"]  # mean over caption tokens, nats
    gradient_norm: Float[Array, " K"]
    alive: Bool[Array, " K"]
    applied: Bool[Array, " K"]  # False: this step did not change the expert
    tokens: Float[Array, " K"]  # caption tokens


def init_state(w0: projector.Params, experts: int, optimizer: optax.GradientTransformation) -> TrainState:
    """K copies of one W0, so that their updates can be compared."""
    params = projector.stack([w0] * experts)
    return TrainState(
        jnp.int32(0), params, optimizer.init(params), jnp.ones(experts, bool), jnp.full(experts, jnp.inf, jnp.float32)
    )


def make_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
    layout: Layout | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`, to be compiled by `layout.compile` (None: one device).

    `frozen` is `{"language": params}`, with `"vision"` beside it where batches bring `images`. An expert whose loss or
    gradient goes wrong is treated as `config.guard` says; where that is `abort`, its update is left out and the caller,
    who sees it in the metrics, ends the run.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, nll, tokens = _gradients(state.params, network, frozen, batch, config, layout)
        scale = 1 / jnp.maximum(tokens, 1)
        loss = nll * scale
        gradients = jax.tree.map(lambda g: g * _like(scale, g), gradients)
        norms = jax.vmap(optax.global_norm)(gradients)
        alive, applied = judged(config.guard, state, loss, norms)

        def chosen(new, old):
            return jax.tree.map(lambda n, o: jnp.where(_like(applied, n), n, o), new, old)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = state.alive & jnp.isfinite(loss)
        new = TrainState(
            state.step + 1,
            chosen(params, state.params),
            chosen(opt_state, state.opt_state),
            alive,
            jnp.where(finite, _average(config.guard, state.loss_average, loss), state.loss_average),
        )
        return _placed(layout, "state", new), _placed(layout, "metrics", Metrics(loss, norms, alive, applied, tokens))

    return step


def make_evaluation(
    network: Network, config: TrainingConfig, layout: Layout | None = None
) -> Callable[[projector.Params, Any, Batch], tuple[Float[Array, " K"], Float[Array, " K"]]]:
    """`evaluate(params, frozen, batch)`: each expert's NLL summed over caption tokens, in nats, and their number.

    In the micro-batches of training.
    """

    def evaluate(params: projector.Params, frozen: Any, batch: Batch):
        def add(total, part):
            return total + _caption_nll(params, network, frozen, part, config, layout), None

        parts = _parts(config, batch, layout)
        nll, _ = jax.lax.scan(add, jnp.zeros(batch["tokens"].shape[0], _kind(params)), _cut(batch, parts))
        return _placed(layout, "metrics", _summed(layout, (nll, _caption_tokens(batch))))

    return evaluate


def _average(guard: GuardConfig, average: jax.Array, loss: jax.Array) -> jax.Array:
    """The running mean with this step's loss, a leap counted as far as it is still none: so that what is skipped for a
    while ends by being the rule, and not by stopping the expert for good."""
    capped = jnp.minimum(loss, guard.spike_factor * average)
    return jnp.where(jnp.isinf(average), loss, _KEEP * average + (1 - _KEEP) * capped).astype(jnp.float32)


def judged(guard: GuardConfig, state: TrainState, loss: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which experts live on, and which of them are updated in this step."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norms)
    spike = (loss > guard.spike_factor * state.loss_average) & (state.step >= guard.spike_warmup)
    alive = state.alive & finite if guard.not_finite == "retire" else state.alive
    applied = state.alive & finite
    return alive, applied if guard.spike == "ignore" else applied & ~spike


def _gradients(params, network, frozen, batch, config, layout) -> tuple[projector.Params, jax.Array, jax.Array]:
    """Gradients of each expert's summed NLL, the sums and the numbers of tokens, over all micro-batches."""

    def total(params, batch):
        nll = _caption_nll(params, network, frozen, batch, config, layout)
        return nll.sum(), nll

    def add(sums, part):
        gradients, nll = jax.grad(total, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, sums, (gradients, nll)), None

    experts, parts = batch["tokens"].shape[0], _parts(config, batch, layout)
    if parts == 1:
        sums = jax.grad(total, has_aux=True)(params, batch)
    else:
        zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(experts, _kind(params))
        sums, _ = jax.lax.scan(add, zeros, _cut(batch, parts))
    return _summed(layout, (*sums, _caption_tokens(batch)))


def _kind(params: projector.Params) -> Any:
    return jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.float32)


def _parts(config: TrainingConfig, batch: Batch, layout: Layout | None) -> int:
    experts, rows = batch["tokens"].shape[:2]
    if _on_mesh(layout):
        sizes = layout.mesh.shape
        experts, rows = experts // sizes["expert"], rows // (sizes["data"] * sizes["fsdp"])
    return micro_batches(config, experts, rows)


def micro_batches(config: TrainingConfig, experts: int, rows: int) -> int:
    """Micro-batches of a device's `rows` of each of its `experts`: so many as `accumulate` says, or as leave the device
    at most `device_batch` at once. InputError where `accumulate` does not divide the rows."""
    if rows % config.accumulate:
        raise InputError(
            f"an expert's {rows} rows on a device cannot be cut into training.accumulate = {config.accumulate} equal "
            "parts; change it, the batch or the mesh"
        )
    if not config.device_batch:
        return config.accumulate
    divisors = (parts for parts in range(config.accumulate, rows + 1) if rows % parts == 0)
    return next((parts for parts in divisors if experts * rows <= parts * config.device_batch), rows)


def _cut(batch: Batch, parts: int) -> Batch:
    """`[K, B, ...]` -> `[parts, K, B / parts, ...]`, each device's rows into as many parts."""
    return {name: jnp.moveaxis(a.reshape(a.shape[0], -1, parts, *a.shape[2:]), 2, 0) for name, a in batch.items()}


def _caption_tokens(batch: Batch) -> Float[Array, " K"]:
    return batch["weights"].sum(axis=(1, 2))


def _caption_nll(params, network, frozen, batch, config, layout) -> Float[Array, " K"]:
    """NLL of each expert on its own part of the batch, summed over caption tokens.

    The experts' axis is mapped over weights that all share, so each frozen matrix is read once whatever K is, and no
    sample influences another expert's loss or gradient.
    """
    language = nnx.merge(network.language, frozen["language"])
    plan = Plan(config.remat, place=lambda x: _constrained(layout, x, P(ROWS)))
    if config.attention == "splash":
        check_splash(language.config, batch["tokens"].shape[-1], *_where(layout))
    visual = projector.apply_stacked(params, _features(network, frozen, batch, layout))

    def hidden(visual, tokens, places, segments, positions):
        visual = visual.reshape(visual.shape[0], -1, visual.shape[-1])  # the images of a row one after the other
        kernel = splash(layout.mesh if _on_mesh(layout) else None, segments) if config.attention == "splash" else None
        how = plan._replace(attention=kernel)
        return vlm.caption_hidden(language, tokens, visual, places, segments, positions, how)

    inputs = (batch["tokens"], batch["places"], batch.get("segments"), batch.get("positions"))
    states = _each_expert(layout, hidden)(visual, *inputs)
    kernel, tied = language.head_weights()  # gathered once for all chunks, and only along the vocabulary still cut
    head = losses.Head(_constrained(layout, kernel, P("tensor") if tied else P(None, "tensor")), tied)
    states = _constrained(layout, states, P("expert", ROWS))
    return losses.caption_nll(states, head, batch["targets"], batch["weights"], config.loss_chunk).sum(axis=1)


def _features(network, frozen, batch, layout) -> Float[Array, "K B I V C"]:
    """The frozen encoder's features of the batch: as they came, or of its images."""
    if "features" in batch:
        return batch["features"]

    def encoded(images):
        rows, count = images.shape[:2]
        flat = images.reshape(rows * count, *images.shape[2:])
        features = vision.visual_features(
            network.vision,
            network.features,
            network.normalise,
            frozen["vision"],
            flat,
            lambda x: _constrained(layout, x, P(ROWS)),
        )
        return features.reshape(rows, count, *features.shape[1:])

    return jax.lax.stop_gradient(_each_expert(layout, encoded)(batch["images"]))


def _each_expert(layout: Layout | None, function: Callable) -> Callable:
    """`function` mapped over the leading axis of experts, which lives on the mesh axis of that name."""
    return jax.vmap(function, spmd_axis_name="expert" if _on_mesh(layout) else None)


def _where(layout: Layout | None) -> tuple[str, int]:
    """The devices' platform, and over how many of them each product with a frozen matrix is spread."""
    return (jax.default_backend(), 1) if layout is None else (layout.platform, layout.mesh.shape["tensor"])


def _on_mesh(layout: Layout | None) -> bool:
    return layout is not None and layout.parallel == "jit"


def _constrained(layout: Layout | None, x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, fitting(layout.mesh, spec, x.shape)) if _on_mesh(layout) else x


def _placed(layout: Layout | None, root: str, tree: Any) -> Any:
    """The tree where the table says that it lives."""
    return jax.lax.with_sharding_constraint(tree, shardings(layout.mesh, root, tree)) if _on_mesh(layout) else tree


def _summed(layout: Layout | None, tree: Any) -> Any:
    """Sums over the devices of `pmap`; under `jit` arrays are whole already."""
    return tree if layout is None or layout.axis is None else jax.lax.psum(tree, layout.axis)


def _like(values: Float[Array, " K"], array: jax.Array) -> jax.Array:
    """`values` shaped to go with an array that has a leading axis K."""
    return values.reshape(-1, *[1] * (array.ndim - 1))
