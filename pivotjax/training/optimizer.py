"""AdamW with warm-up and cosine decay, kept apart for every expert."""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import optax

from pivotjax.config import check_least
from pivotjax.errors import InputError
from pivotjax.models.language import Remat


@dataclass(frozen=True)
class GuardConfig:
    """What happens to an expert whose loss or gradient goes wrong; the other experts go on."""

    not_finite: Literal["retire", "skip", "abort"] = "retire"
    """Loss or gradient is not finite: the expert keeps its last weights for good, this step's update alone is left
    out, or the run ends."""
    spike: Literal["ignore", "skip", "abort"] = "ignore"
    """The loss leaps: the update is made all the same, it is left out, or the run ends."""
    spike_factor: float = 3.0
    """A loss so many times the expert's running mean is a leap."""
    spike_warmup: int = 20
    """Steps in which nothing counts as a leap."""

    def __post_init__(self):
        check_least(self, spike_factor=1, spike_warmup=1)


@dataclass(frozen=True)
class TrainingConfig:
    """How the projectors are trained (LLaVA's stage 1: AdamW, warm-up .03, cosine, no weight decay)."""

    steps: int = 250
    """Optimizer steps."""
    batch: int = 8
    """Samples of each domain in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    warmup: float = 0.03
    """Share of the steps, at most 1, in which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global gradient norm of an expert; 0: gradients are not clipped."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, with one update for all (less memory, same numbers)."""
    device_batch: int = 0
    """Samples that a device takes at once; a batch is cut into more parts where it would be more (0: no limit)."""
    remat: Remat = "none"
    """What of the LLM is computed again in the backward pass instead of kept: nothing; everything between its layers'
    inputs (layers); all but the products with weights (dots), kept on the device or in the host's memory (offload)."""
    loss_chunk: int = 8
    """Caption tokens of a sample whose logits exist at once."""
    attention: Literal["xla", "splash"] = "xla"
    """The LLM's attention: as XLA compiles it, or TPU's splash kernel."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    log_every: int = 5
    """Write metrics every so many steps."""

    def __post_init__(self):
        check_least(self, steps=1, batch=1, learning_rate=0, warmup=0, weight_decay=0, clip=0, log_every=1)
        check_least(self, accumulate=1, device_batch=0, loss_chunk=1)
        if self.warmup > 1:
            raise InputError(f"warmup is a share of the steps, at most 1, not {self.warmup}")


def schedule(config: TrainingConfig) -> optax.Schedule:
    """step -> learning rate: linear over the warm-up, then cosine to 0; not even the first step is at 0."""
    warmup = max(1, round(config.warmup * config.steps))
    first = config.learning_rate / warmup
    return optax.warmup_cosine_decay_schedule(first, config.learning_rate, warmup, max(config.steps, warmup + 1))


def adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, for one projector."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip or math.inf),
        optax.adamw(schedule(config), b1=0.9, b2=0.999, weight_decay=config.weight_decay),
    )


def per_expert(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer for each of K experts stacked on a leading axis: not even the clipping norm is shared."""
    return optax.GradientTransformation(
        jax.vmap(optimizer.init), lambda updates, state, params: jax.vmap(optimizer.update)(updates, state, params)
    )
