"""Parts from a config: the frozen models, the caption encoder, the feature files of every domain and split."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from pivotjax import config as configs
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.data import assets, domains, features, images, parts, scenarios
from pivotjax.data.captions import Captioner, LongCaptions, Template
from pivotjax.data.corpora import Corpus, CorpusConfig, open_corpus
from pivotjax.data.decode import BAD_LIMIT, listed
from pivotjax.data.domains import SPLITS, Split
from pivotjax.data.features import StoredType
from pivotjax.data.pictures import Decoder, NonRGB, Pictures
from pivotjax.data.pipeline import Feed
from pivotjax.data.sources import source
from pivotjax.data.stream import TOO_LONG, Samples
from pivotjax.errors import InputError
from pivotjax.models.language import Language, Place, load_language
from pivotjax.models.processors import Processor, load_processor, rgb
from pivotjax.models.projector import ProjectorConfig
from pivotjax.models.vision import Encoder, Features, load_encoder
from pivotjax.progress import say


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
    """Type of the frozen LLM's weights and arithmetic, and of those of an encoder inside the training step; the
    projector stays float32."""


@dataclass(frozen=True)
class DataConfig:
    """Which image-caption pairs, and how they become batches."""

    domains: tuple[str, ...] = ("emoji", "icons", "shapes")
    """Packaged domains to train on, one expert each; `scenario`, or `corpora` in a recipe, take their place
    (docs/data.md)."""
    scenario: Path | None = None
    """Folder of a scenario, as `pivotjax scenario` writes it: its domains are trained on, one expert each."""
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    """Corpora to train on by name, each one a domain; some of them are set apart for calibration and test. With a
    scenario: where its corpora of these names are, if not where they were when it was made."""
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of the domains in a joint projector's batches, one for each (default: equal)."""
    template: Template = "prompt"
    """prompt: image, prompt, caption, end of sequence. plain: as LLaVA's stage 1: image, caption, end of line."""
    prompt: str = "\n"
    """Text between image and caption, the same for all domains."""
    max_caption: int = 12
    """Longest caption in tokens, end of sequence included."""
    long_captions: LongCaptions = "drop"
    """Longer captions: their samples are dropped and counted, or they are cut."""
    train: int | None = 1200
    """At most so many training samples of a domain (null: all)."""
    calibration: int = 128
    """At most so many calibration samples of a domain (0: none)."""
    test: int = 48
    """At most so many test samples of a domain (0: none)."""
    split_seed: int = 0
    """Seed of the split of concepts into train, calibration and test."""
    features: Literal["cache", "online"] = "cache"
    """Training pictures: encoded once, their features kept on disk, or encoded in every training step."""
    cache_dtype: StoredType = "float16"
    """Type of cached features of corpora and scenarios; bfloat16 ones go to the devices as they are."""
    fit: Literal["square", "processor"] = "square"
    """How pictures become square: centred in white, or by the encoder's processor (CLIP: the middle is cut out)."""
    non_rgb: NonRGB = "convert"
    """Pictures of corpora and scenarios that are not RGB: converted and counted, or dropped as bad."""
    bad_limit: float = BAD_LIMIT
    """Share of bad samples above which a run stops."""
    pack: int = 1
    """Samples packed into one row."""
    row_tokens: int = 0
    """Tokens of a packed row; where its captions do not fit, the longest are cut (0: room for all)."""
    workers: int = 0
    """Processes that decode and tokenise (0: threads of the main process)."""

    def __post_init__(self) -> None:
        if self.train is not None and self.train < 1:
            raise InputError(f"train must be at least 1, or null for all, not {self.train}")
        configs.check_least(self, max_caption=1, calibration=0, test=0, bad_limit=0, pack=1, row_tokens=0, workers=0)

    @property
    def named(self) -> tuple[str, ...]:
        """The domains that are trained on, so far as the recipe itself names them: none of a scenario's."""
        return () if self.scenario is not None else tuple(self.corpora) or self.domains

    @property
    def packaged(self) -> tuple[str, ...]:
        """The packaged domains that are trained on."""
        return () if self.scenario is not None or self.corpora else self.domains


@dataclass(frozen=True)
class Frozen:
    """The frozen parts of a run."""

    language: Language
    encoder: Encoder
    captioner: Captioner
    fit: Processor | None = None  # what makes pictures square; None: centred in white

    def picture(self, path: Path) -> UInt8[np.ndarray, "S S 3"]:
        """Any picture file as the encoder takes it; InputError names one that cannot be read."""
        if self.fit is None or path.suffix.lower() == ".svg":
            return images.open_image(path, self.encoder.image_size)
        return self.fit.fitted(rgb(images.read_image(path)))

    @property
    def identity(self) -> dict[str, str]:
        """What a projector belongs to: hashes of the weights and the caption template."""
        return {"vision": self.encoder.identity, "language": self.language.identity, "prompt": self.captioner.identity}


@dataclass(frozen=True)
class Domain:
    """One domain's samples by split, and what was left out of it.

    Those set apart for calibration and test are always features; those for training may be pictures.

    Fields:
        name: the domain's.
        splits: its samples; without those that were not asked for or that it has none of, and without `train` where
            it was loaded for evaluation alone.
        dropped: how many samples were left out, by reason.
        identity: SHA-256 over the samples of all its splits, used or not: what a run that goes on has to find again.
    """

    name: str
    splits: dict[Split, Samples]
    dropped: dict[str, int]
    identity: str

    def samples(self, split: Split) -> Samples:
        """Those of a split; InputError where there are none."""
        if split not in self.splits:
            raise InputError(f"domain {self.name} has no {split} samples; give it some (data.{split}), or leave it out")
        return self.splits[split]


def asset_names(model: ModelConfig, domain_names: Sequence[str]) -> list[str]:
    """The packages that a model and its packaged domains come from."""
    packaged = [name for name in (model.vision, model.language) if name in assets.ASSETS]
    return list(dict.fromkeys([*packaged, *(asset for name in domain_names for asset in source(name).assets)]))


def domain_names(data: DataConfig, cache: Path) -> tuple[str, ...]:
    """The domains that are trained on: a scenario's, the corpora, or packaged ones. InputError where there are none, or
    where they cannot be called so."""
    names = data.named if data.scenario is None else tuple(_scenario(data, cache).domains)
    if not names or len(set(names)) < len(names):
        raise InputError(f"training needs different domains, not {', '.join(names) or 'none'}; see data.domains")
    domains.check_names(names)
    return names


def check_weights(data: DataConfig, names: Sequence[str], joint: bool) -> None:
    """InputError where `data.weights` are not those of several domains that are mixed."""
    if data.weights and not (joint and len(names) > 1):
        raise InputError("data.weights mixes domains of a joint projector, but none are mixed; add --joint or drop it")
    if data.weights and set(data.weights) != set(names):
        given, there = ", ".join(data.weights), ", ".join(names)
        raise InputError(f"data.weights has {given}, the domains are {there}; give one to each of them")


def open_corpora(data: DataConfig, cache: Path) -> dict[str, Corpus]:
    """The corpora of the config by name, but for a scenario's; their indices are made where they are missing."""
    if data.scenario is not None:
        return {}
    return {name: open_corpus(config, cache) for name, config in data.corpora.items()}


def load_frozen(model: ModelConfig, data: DataConfig, cache: Path, place: Place | None = None) -> Frozen:
    """Loads encoder and LLM, fetching packaged weights on first use; the LLM's go straight to where `place` says."""
    language = load_language(weights(model.language, cache), jnp.dtype(model.dtype), place)
    chosen = Features(model.select_layer, model.select_features, model.projector.kind)
    folder = weights(model.vision, cache)
    encoder = load_encoder(folder, chosen)
    captioner = Captioner(
        language.tokenizer,
        language.eos_id,
        data.prompt,
        encoder.num_tokens,
        data.max_caption,
        data.template,
        data.long_captions,
    )
    return Frozen(language, encoder, captioner, _processor(folder) if data.fit == "processor" else None)


def weights(name: str, cache: Path) -> Path:
    if name in assets.ASSETS:
        return assets.extract(name, cache)
    if not Path(name).exists():
        packaged = [key for key, asset in assets.ASSETS.items() if asset.member]
        raise InputError(f"no weights at {name!r}; give a path, or one of the packaged: {', '.join(packaged)}")
    return Path(name)


def _processor(folder: Path) -> Processor:
    processor = load_processor(folder) if folder.is_dir() else None
    if not isinstance(processor, Processor):
        raise InputError(f"{folder} has no processor that makes one image of a picture; set data.fit to square")
    return processor


def load_domain(
    name: str,
    data: DataConfig,
    frozen: Frozen,
    cache: Path,
    held_out_only: bool = False,
    corpora: Mapping[str, Corpus] | None = None,
) -> Domain:
    """A domain of the config, or any packaged one, in its splits; what is encoded is encoded once.

    `held_out_only`: without the training split of a scenario's domain or a corpus, whatever its size. `corpora`: those
    of the config, if they are open already.
    """
    decoder = Decoder(frozen.fit, data.non_rgb)
    limits = {"train": data.train, "calibration": data.calibration, "test": data.test}
    if data.scenario is not None and name in _scenario(data, cache).domains:
        whole = _scenario(data, cache).domains[name]
        splits = {split: parts.limited(whole[split], limit, data.split_seed) for split, limit in limits.items()}
        if not held_out_only:
            _say_cut(name, len(splits["train"]), len(whole["train"]))
        return _large_domain(name, splits, {}, data, frozen, decoder, cache, held_out_only)
    if data.scenario is None and name in data.corpora:
        corpus = corpora[name] if corpora else open_corpus(data.corpora[name], cache)
        splits = parts.split(name, corpus, limits, data.split_seed)
        if not held_out_only:
            _say_cut(name, len(splits["train"]), len(corpus) - data.calibration - data.test)
        return _large_domain(name, splits, corpus.lost, data, frozen, decoder, cache, held_out_only)
    return _packaged_domain(name, data, frozen, decoder, cache)


def feed(
    experts: Mapping[str, Sequence[str]],
    loaded: Mapping[str, Domain],
    data: DataConfig,
    frozen: Frozen,
    batch: int,
    seed: int,
    split: Split = "train",
) -> Feed:
    """Batches of a split for experts, each given by the names of its domains; `batch` samples of a domain in a step."""
    return Feed(
        {expert: [loaded[name].samples(split) for name in names] for expert, names in experts.items()},
        frozen.captioner,
        batch,
        seed,
        weights=data.weights or None,
        pack=data.pack,
        row_tokens=data.row_tokens,
        workers=data.workers,
        bad_limit=data.bad_limit,
    )


def _say_cut(name: str, used: int, available: int) -> None:
    if used < available:
        say(f"{name}: {used:,} of {available:,} training samples (data.train)")


def _say_left_out(name: str, count: int, left_out: Mapping[str, int]) -> None:
    if lost := sum(left_out.values()):
        say(f"{name}: {lost:,} of {count:,} samples left out ({listed(left_out.items())})")


def _scenario(data: DataConfig, cache: Path) -> scenarios.Scenario:
    return _loaded(data.scenario, cache, tuple(data.corpora.items()))


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, cache: Path, corpora: tuple[tuple[str, CorpusConfig], ...]) -> scenarios.Scenario:
    return scenarios.load(path, cache, dict(corpora))


def _packaged_domain(name: str, data: DataConfig, frozen: Frozen, decoder: Decoder, cache: Path) -> Domain:
    """Items split by concept; those whose captions do not fit are left out before."""
    items = source(name).items(assets.fetch(source(name).assets, cache))
    fitting, too_long = frozen.captioner.keep_fitting(items)
    left_out = {"caption longer than data.max_caption": too_long}
    _say_left_out(name, len(items), left_out)
    if not fitting:
        raise InputError(
            f"domain {name}: none of {len(items)} captions fits data.max_caption = {data.max_caption} tokens; raise it"
        )
    chosen = domains.select(
        name, fitting, train=data.train, calibration=data.calibration, test=data.test, seed=data.split_seed
    )
    render, variant = (images.render, "") if frozen.fit is None else (decoder.pixels, f" {frozen.fit}")
    splits: dict[Split, Samples] = {}
    for split in SPLITS:
        if not chosen[split]:
            continue
        if split == "train" and data.features == "online":
            splits[split] = Pictures(chosen[split], name, frozen.encoder.image_size, decoder)
        else:
            path = features.build(
                f"{name}-{split}", chosen[split], frozen.encoder, cache / "features", render=render, variant=variant
            )
            splits[split] = features.FeatureSource(path, name)
    keys = {split: "\n".join(item.key for item in items) for split, items in chosen.items()}
    return Domain(name, splits, left_out, _identity(keys))


def _large_domain(
    name: str,
    corpora: Mapping[Split, Corpus],
    lost: Mapping[str, int],
    data: DataConfig,
    frozen: Frozen,
    decoder: Decoder,
    cache: Path,
    held_out_only: bool,
) -> Domain:
    """Samples of a scenario's domain or a corpus; bad ones and captions that do not fit are left out where they are
    met: of what is held out here, of training samples when they are read. InputError where that leaves nothing of what
    is held out."""
    splits: dict[Split, Samples] = {}
    dropped = Counter(lost)
    for split, corpus in corpora.items():
        if not len(corpus) or (split == "train" and held_out_only):
            continue
        if split == "train" and data.features == "online":
            fits = frozen.captioner.fits if data.long_captions == "drop" else None
            splits[split] = Pictures(corpus, name, frozen.encoder.image_size, decoder, fits)
            continue
        path = features.build_shards(
            f"{name}-{split}",
            corpus,
            frozen.encoder,
            cache / "features",
            decoder.pixels,
            variant=str(decoder),
            dtype=data.cache_dtype if split == "train" else "float16",
            threads=max(2, data.workers or os.cpu_count()),
            bad_limit=data.bad_limit,
        )
        stored = features.ShardedFeatures(path, name)
        left_out = Counter(stored.dropped())
        splits[split] = stored if split == "train" else _fitting(stored, frozen.captioner, left_out)
        if left_out.total() == len(corpus):
            raise InputError(
                f"domain {name} has no {split} samples that can be used, of {len(corpus):,} "
                f"({listed(left_out.items())}); raise data.max_caption or data.{split}, or set data.long_captions to "
                "truncate"
            )
        _say_left_out(f"{name}-{split}", len(corpus), left_out)
        dropped.update(left_out)
    identity = _identity({split: corpus.identity for split, corpus in corpora.items()})
    return Domain(name, splits, dict(dropped), identity)


def _identity(splits: Mapping[Split, str]) -> str:
    """A hash of what stands for each split."""
    return hashlib.sha256("\0".join(splits[split] for split in SPLITS).encode()).hexdigest()


def _fitting(stored: features.ShardedFeatures, captioner: Captioner, left_out: Counter[str]) -> features.Chosen:
    """The samples that are not bad and whose captions fit; the others are counted."""
    usable = stored.usable()
    fitting = tuple(index for index in usable.indices if captioner.fits(stored[index]["caption"]))
    if len(fitting) < len(usable):
        left_out[TOO_LONG] = len(usable) - len(fitting)
    return features.Chosen(stored, fitting)


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
    frozen = load_frozen(model, data, cache)
    if frozen.identity != info["backbone"]:
        differing = [part for part in frozen.identity if frozen.identity[part] != info["backbone"].get(part)]
        raise InputError(
            f"{where} was trained between other weights ({', '.join(differing)} differ); give the ones of its config"
        )
    return frozen
