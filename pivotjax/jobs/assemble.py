"""Parts from a config: the frozen models, the caption encoder, the feature files of every domain and split."""

import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from pivotjax import __version__
from pivotjax import config as configs
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.data import assets, domains, features
from pivotjax.data.captions import Captioner
from pivotjax.data.sources import source
from pivotjax.errors import InputError
from pivotjax.models.language import Language, load_language
from pivotjax.models.projector import ProjectorConfig
from pivotjax.models.vision import Encoder, Features, load_encoder


@dataclass(frozen=True)
class ModelConfig:
    """The frozen models and the projector between them."""

    vision: str = "efficientnet-lite0"
    """Vision encoder: the name of a packaged one, or a path (the Hugging Face folder of a CLIP or SigLIP)."""
    language: str = "smollm2-135m"
    """LLM: the name of a packaged one, or a path (a GGUF file or a Hugging Face folder)."""
    select_layer: int = -2
    """Features of a CLIP or SigLIP: its hidden states after this layer; -1 is the last, 0 the embedding."""
    select_features: Literal["patch", "cls_patch"] = "patch"
    """Its patch tokens alone, or its class token before them."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen LLM's weights and arithmetic; the projector stays float32."""


@dataclass(frozen=True)
class DataConfig:
    """Which image-caption pairs, and how captions become tokens."""

    domains: tuple[str, ...] = ("emoji", "icons", "shapes")
    """Domains to train on, one expert each."""
    prompt: str = "\n"
    """Text between image and caption, the same for all domains."""
    max_caption: int = 12
    """Longest caption in tokens, end of sequence included; samples with longer ones are dropped and counted."""
    train: int = 1200
    """At most so many training samples of a domain."""
    calibration: int = 128
    """At most so many calibration samples of a domain."""
    test: int = 48
    """At most so many test samples of a domain."""
    split_seed: int = 0
    """Seed of the split of concepts into train, calibration and test."""


@dataclass(frozen=True)
class Frozen:
    """The frozen parts of a run."""

    language: Language
    encoder: Encoder
    captioner: Captioner

    @property
    def identity(self) -> dict[str, str]:
        """What a projector belongs to: hashes of the weights and the caption template."""
        return {"vision": self.encoder.identity, "language": self.language.identity, "prompt": self.captioner.prompt}


@dataclass(frozen=True)
class Domain:
    """One domain's cached features by split, and what was left out of it."""

    name: str
    splits: dict[str, features.FeatureSource]
    dropped: dict[str, int]


def asset_names(model: ModelConfig, domain_names: tuple[str, ...]) -> list[str]:
    """The packages that a model and its domains come from."""
    packaged = [name for name in (model.vision, model.language) if name in assets.ASSETS]
    return list(dict.fromkeys([*packaged, *(asset for name in domain_names for asset in source(name).assets)]))


def load_frozen(model: ModelConfig, prompt: str, max_caption: int, cache: Path) -> Frozen:
    """Loads encoder and LLM, fetching packaged weights on first use."""
    language = load_language(_weights(model.language, cache), jnp.dtype(model.dtype))
    chosen = Features(model.select_layer, model.select_features, model.projector.kind)
    encoder = load_encoder(_weights(model.vision, cache), chosen)
    captioner = Captioner(language.tokenizer, language.eos_id, prompt, encoder.num_tokens, max_caption)
    return Frozen(language, encoder, captioner)


def _weights(name: str, cache: Path) -> Path:
    if name in assets.ASSETS:
        return assets.extract(name, cache)
    if not Path(name).exists():
        packaged = [key for key, asset in assets.ASSETS.items() if asset.member]
        raise InputError(f"no weights at {name!r}; give a path, or one of the packaged: {', '.join(packaged)}")
    return Path(name)


def load_domain(name: str, data: DataConfig, frozen: Frozen, cache: Path) -> Domain:
    """Items of a domain, split by concept, rendered, encoded and cached; each part is made once."""
    items = source(name).items(assets.fetch(source(name).assets, cache))
    fitting, too_long = frozen.captioner.keep_fitting(items)
    if not fitting:
        raise InputError(
            f"domain {name}: none of {len(items)} captions fits data.max_caption = {data.max_caption} tokens; raise it"
        )
    chosen = domains.select(
        name, fitting, train=data.train, calibration=data.calibration, test=data.test, seed=data.split_seed
    )
    folder = cache / "features"
    splits = {
        split: features.FeatureSource(features.build(f"{name}-{split}", chosen[split], frozen.encoder, folder), name)
        for split in domains.SPLITS
    }
    return Domain(name, splits, {"caption longer than data.max_caption": too_long})


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"pivotjax": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def load_projector(path: Path) -> store.Projector:
    """A projector and its provenance, from an Orbax folder or a .safetensors file."""
    return (
        store.Projector(*torch_bridge.load_torch(path)) if path.suffix == ".safetensors" else store.load_projector(path)
    )


def config_of(info: dict[str, Any], where: str) -> tuple[ModelConfig, DataConfig]:
    """The models and data that a projector was trained with, as its checkpoint tells."""
    if "config" not in info:
        raise InputError(
            f"{where} does not say which models it was trained between; use a projector that pivotjax saved"
        )
    saved = info["config"]
    return (
        configs.from_dict(ModelConfig, saved["model"], where),
        configs.from_dict(DataConfig, saved["data"], where),
    )


def frozen_of(info: dict[str, Any], cache: Path, where: str) -> Frozen:
    """The frozen models of a projector; InputError if today's weights are not those it was trained between."""
    model, data = config_of(info, where)
    assets.fetch(asset_names(model, ()), cache)
    frozen = load_frozen(model, data.prompt, data.max_caption, cache)
    if frozen.identity != info["backbone"]:
        differing = [part for part in frozen.identity if frozen.identity[part] != info["backbone"].get(part)]
        raise InputError(
            f"{where} was trained between other weights ({', '.join(differing)} differ); give the ones of its config"
        )
    return frozen
