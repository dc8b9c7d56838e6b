"""Calibration data for the merge methods that use it: real pairs, seen through the frozen models."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax import config as configs
from pivotjax.data.captions import Captioner, Encoded
from pivotjax.data.features import FeatureSource
from pivotjax.evaluation import runner
from pivotjax.jobs.assemble import Frozen
from pivotjax.merging.calibration import FeatureCalibration
from pivotjax.models import projector


@dataclass(frozen=True)
class CalibrationConfig:
    """How much of each domain's calibration split a merge may see."""

    images: int = 128
    """Images of each domain for input statistics (the LLM is not run)."""
    captions: int = 24
    """Image-caption pairs of each domain for the caption loss (layer weights, tuning of the scale)."""

    def __post_init__(self):
        configs.check_least(self, images=1, captions=1)


def read_features(source: FeatureSource, samples: int) -> np.ndarray:
    """The first `samples` samples' frozen features, float32 `[N, V, d]`."""
    return np.stack([source[i]["features"] for i in range(min(samples, len(source)))])


def read_captions(source: FeatureSource, captioner: Captioner, samples: int) -> Encoded:
    """The first `samples` captions: tokens `[N, L]`, targets `[N, T]`, weights `[N, T]`."""
    encoded = [captioner.encode(source[i]["caption"]) for i in range(min(samples, len(source)))]
    return Encoded(*(np.stack(column) for column in zip(*encoded)))


def of_experts(
    frozen: Frozen, sources: Sequence[Sequence[FeatureSource]], config: CalibrationConfig
) -> FeatureCalibration:
    """Calibration over each expert's own domains (`sources[k]`: the calibration splits of expert k's domains)."""
    distinct = list({source.path: source for own in sources for source in own}.values())
    features = np.concatenate([read_features(source, config.captions) for source in distinct])
    captions = [read_captions(source, frozen.captioner, config.captions) for source in distinct]
    captions = Encoded(*(np.concatenate(column) for column in zip(*captions)))

    def caption_loss(params: projector.Params) -> jax.Array:
        language = frozen.language
        return jnp.asarray(runner.caption_losses(language, language.params, params, features, *captions), jnp.float32)

    images = [np.concatenate([read_features(source, config.images) for source in own]) for own in sources]
    return FeatureCalibration(layer_inputs=projector.layer_inputs, features=images, caption_loss=caption_loss)
