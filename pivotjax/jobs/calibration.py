"""Calibration data for the merge methods that use it: real pairs, seen through the frozen models.

Everything is streamed: pairs are read from the feature files in batches of one shape, anew for every statistic, so that
neither the features of many images nor the gradients of many examples are ever held together. What the frozen LLM has
to say comes back to the host: where its weights lie on the devices of several processes, its answers do too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pivotjax import config as configs
from pivotjax.checkpoints import store
from pivotjax.data.captions import Captioner, Encoded
from pivotjax.data.features import FeatureSource, Sample
from pivotjax.errors import InputError
from pivotjax.evaluation import runner
from pivotjax.evaluation.runner import HERE, Spread
from pivotjax.jobs import assemble
from pivotjax.jobs.assemble import Frozen
from pivotjax.merging.calibration import FeatureCalibration, Measure, Objective, agreement
from pivotjax.merging.updates import is_traced
from pivotjax.models import projector, vlm
from pivotjax.models.language import Language
from pivotjax.progress import Bar
from pivotjax.training import hosts

_SLOTS_A_CALL = 512  # tokens of one pass forward and back, whose activations are kept

Batch = dict[str, np.ndarray]  # features [B, V, d], tokens [B, L], targets [B, T], weights [B, T] (0 in padding)


@dataclass(frozen=True)
class CalibrationConfig:
    """How much of each domain's calibration split a merge may see; less where the split holds less."""

    images: int = 128
    """Images of each domain for input statistics and for alignment with captions (the LLM is not run)."""
    captions: int = 24
    """Image-caption pairs of each domain for the caption loss and its gradient (layer weights, AdaMerging, tuning)."""
    examples: int = 256
    """Image-caption pairs of each domain for gradients one by one (Fisher)."""

    def __post_init__(self):
        configs.check_least(self, images=1, captions=1, examples=1)


def of_experts(
    frozen: Frozen, sources: Sequence[Sequence[FeatureSource]], config: CalibrationConfig, spread: Spread = HERE
) -> FeatureCalibration:
    """Calibration over each expert's own domains (`sources[k]`: the calibration splits of expert k's domains).

    The devices of `spread` share the captions whose loss is measured.
    """
    statistics = CaptionStatistics(frozen.language, frozen.captioner, sources, config, spread)
    return FeatureCalibration(
        layer_inputs=projector.layer_inputs,
        features=[_Features(_Pairs(own, config.images)) for own in sources],
        caption_loss=statistics.loss,
        caption_gradient=statistics.loss_gradient,
        caption_fisher=statistics.fisher,
        caption_alignment=statistics.alignment,
    )


def trained_on(experts: Mapping[str, store.Projector]) -> list[tuple[str, ...]]:
    """Each expert's own domains, as its checkpoint names them."""
    for name, expert in experts.items():
        if not expert.info.get("domains"):
            raise InputError(f"{name} does not say which domains it was trained on; merge it without calibration")
    return [tuple(expert.info["domains"]) for expert in experts.values()]


def open_splits(
    experts: Mapping[str, store.Projector], domains: Sequence[Sequence[str]], cache: Path
) -> tuple[Frozen, dict[str, FeatureSource]]:
    """The frozen models that the experts were trained between, and the calibration splits of domains by name."""
    first, expert = next(iter(experts.items()))
    frozen = assemble.frozen_of(expert.info, cache, first)
    _, data = assemble.config_of(expert.info, first)
    names = sorted({domain for some in domains for domain in some})
    loaded = {name: assemble.load_domain(name, data, frozen, cache, held_out_only=True) for name in names}
    return frozen, {name: domain.samples("calibration") for name, domain in loaded.items()}


@dataclass(frozen=True)
class _Pairs:
    """The first `samples` samples of each source, one source after the other."""

    sources: Sequence[FeatureSource]
    samples: int

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getitem__(self, index: int) -> Sample:
        for source, length in zip(self.sources, self._lengths):
            if index < length:
                return source[index]
            index -= length
        raise IndexError(index)

    @property
    def _lengths(self) -> list[int]:
        return [min(self.samples, len(source)) for source in self.sources]

    def batches(self, captioner: Captioner, size: int) -> Iterator[Batch]:
        """All pairs in batches of `size` rows; the last one is filled up with rows of weight 0."""
        for start in range(0, len(self), size):
            rows = [self._row(i, captioner) for i in range(start, min(start + size, len(self)))]
            empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
            rows += [empty] * (size - len(rows))
            yield {name: np.stack([row[name] for row in rows]) for name in empty}

    def _row(self, index: int, captioner: Captioner) -> Batch:
        sample = self[index]
        return {"features": sample["features"], **captioner.encode(sample["caption"])._asdict()}


@dataclass(frozen=True)
class _Features:
    """The features alone."""

    pairs: _Pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Float[np.ndarray, "V d"]:
        return self.pairs[index]["features"]


class CaptionStatistics:
    """What the frozen LLM says of calibration pairs: the captions' part of the `Calibration` protocol.

    Args:
        language: the frozen LLM.
        captioner: how captions become tokens.
        sources: the calibration splits of each expert's own domains.
        config: how many pairs of each domain.
        spread: the devices that share the captions whose loss is measured.
    """

    def __init__(
        self,
        language: Language,
        captioner: Captioner,
        sources: Sequence[Sequence[FeatureSource]],
        config: CalibrationConfig,
        spread: Spread = HERE,
    ):
        every = list({id(source): source for own in sources for source in own}.values())
        self._language, self._captioner, self._spread = language, captioner, spread
        self._program = (language.graphdef, captioner.first_position)  # what the compiled functions are made for
        self._measured, self._compared = _Pairs(every, config.captions), _Pairs(every, config.images)
        self._own = [_Pairs(own, config.examples) for own in sources]
        self._size = max(1, _SLOTS_A_CALL // captioner.length)

    def loss(self, params: projector.Params) -> Float[Array, " P"]:
        """See `Calibration.loss`."""
        _refuse_traced(params)
        samples = [self._measured[i] for i in range(len(self._measured))]
        features = np.stack([sample["features"] for sample in samples])
        encoded = [self._captioner.encode(sample["caption"]) for sample in samples]
        captions = Encoded(*(np.stack(column) for column in zip(*encoded)))
        language, spread = self._language, self._spread
        losses = runner.caption_losses(language, language.params, params, features, *captions, spread=spread)
        return jnp.asarray(losses, jnp.float32)

    def loss_gradient(
        self, params: projector.Params, objective: Objective
    ) -> tuple[Float[Array, " P"], projector.Params]:
        """See `Calibration.loss_gradient`."""
        _refuse_traced(params)
        found = [self._loss_gradient(one, objective) for one in projector.unstack(params)]
        losses, gradients = zip(*found)
        return jnp.stack(losses), projector.stack(gradients)

    def _loss_gradient(self, params: projector.Params, objective: Objective) -> tuple[Array, projector.Params]:
        total, tokens = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), 0.0
        for batch in self._measured.batches(self._captioner, self._size):
            total = _add_gradient(*self._program, objective, total, self._language.params, params, batch)
            tokens += batch["weights"].sum()
        return jax.tree.map(lambda leaf: leaf / tokens, hosts.fetch(total))

    def fisher(self, params: projector.Params) -> projector.Params:
        """See `Calibration.fisher`."""
        _refuse_traced(params)
        with Bar(sum(map(len, self._own)), "fisher", unit="pair") as bar:
            return projector.stack([self._fisher(*one, bar) for one in zip(projector.unstack(params), self._own)])

    def _fisher(self, params: projector.Params, pairs: _Pairs, bar: Bar) -> projector.Params:
        total = jax.tree.map(jnp.zeros_like, params)
        for batch in pairs.batches(self._captioner, self._size):
            total = _add_squares(*self._program, total, self._language.params, params, batch)
            jax.block_until_ready(total)  # so that the bar tells the truth
            bar.update(int(batch["weights"].any(axis=1).sum()))
        return jax.tree.map(lambda leaf: leaf / len(pairs), hosts.fetch(total))

    def alignment(self, params: projector.Params, measure: Measure) -> Float[Array, " P"]:
        """See `Calibration.alignment`."""
        _refuse_traced(params)
        each = projector.unstack(params)
        visual, captions = [[] for _ in each], []
        for batch in self._compared.batches(self._captioner, self._size):
            captions.append(hosts.fetch(_mean_embeddings(self._language.graphdef, self._language.params, batch)))
            for found, one in zip(visual, each):
                found.append(_mean_tokens(one, batch["features"]))
        pairs = len(self._compared)
        text = jnp.concatenate(captions)[:pairs]
        return jnp.stack([agreement(jnp.concatenate(found)[:pairs], text, measure) for found in visual])


def _refuse_traced(params: projector.Params) -> None:
    if is_traced(params):
        raise InputError("calibration pairs are read from files, which no traced program can do: merge outside jax.jit")


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _add_gradient(
    graphdef: nnx.GraphDef,
    first_position: int,
    objective: Objective,
    total: tuple[Array, projector.Params],
    frozen: Any,
    params: projector.Params,
    batch: Batch,
) -> tuple[Array, projector.Params]:
    """`total` + (the batch's loss summed over tokens, its gradient)."""

    def loss(params: projector.Params) -> Array:
        visual = projector.apply(params, batch["features"])
        return _token_losses(nnx.merge(graphdef, frozen), visual, batch, first_position, objective).sum()

    return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add_squares(
    graphdef: nnx.GraphDef,
    first_position: int,
    total: projector.Params,
    frozen: Any,
    params: projector.Params,
    batch: Batch,
) -> projector.Params:
    """`total` + the sum over the batch's pairs of the squared gradient of each one's log-likelihood.

    The LLM goes back once for the whole batch, to the visual tokens, where pairs do not mix; from there each pair goes
    back through the projector by itself, one after the other, so that one gradient is held whatever the batch.
    """

    def loss(visual: Float[Array, "B V D"]) -> Array:
        return _token_losses(nnx.merge(graphdef, frozen), visual, batch, first_position, "caption").sum()

    def add(total: projector.Params, pair: tuple[Array, Array]) -> tuple[projector.Params, None]:
        features, slope = pair
        _, back = jax.vjp(lambda params: projector.apply(params, features), params)
        return jax.tree.map(lambda t, g: t + g * g, total, back(slope)[0]), None

    slopes = jax.grad(loss)(projector.apply(params, batch["features"]))
    return jax.lax.scan(add, total, (batch["features"], slopes))[0]


def _token_losses(
    language: Any, visual: Float[Array, "B V D"], batch: Batch, first_position: int, objective: Objective
) -> Float[Array, "B T"]:
    """What each caption token costs under the objective, 0 in padding."""
    targets = batch["targets"]
    logits = vlm.caption_logits(language, batch["tokens"], visual, targets.shape[1], first_position)
    cost = vlm.token_nll(logits, targets) if objective == "caption" else vlm.token_entropy(logits)
    return batch["weights"] * cost


@jax.jit
def _mean_tokens(params: projector.Params, features: Float[Array, "B V d"]) -> Float[Array, "B D"]:
    return projector.apply(params, features).mean(axis=1)


@partial(jax.jit, static_argnums=0)
def _mean_embeddings(graphdef: nnx.GraphDef, frozen: Any, batch: Batch) -> Float[Array, "B D"]:
    """The mean embedding of each caption's own tokens: those after which another one, or the end, still comes."""
    words = batch["weights"][:, 1:, None]
    embedded = nnx.merge(graphdef, frozen).embed(batch["targets"][:, :-1]).astype(jnp.float32)
    return (words * embedded).sum(axis=1) / jnp.maximum(words.sum(axis=1), 1)
