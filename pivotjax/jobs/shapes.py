"""A recipe's training step by its shapes: from config.json and tokenizer where a model's folder is there, else from
what is published of it. No weights are read."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pivotjax.data import rows
from pivotjax.data.captions import Captioner
from pivotjax.data.scenarios.folder import MANIFEST
from pivotjax.errors import InputError
from pivotjax.files import read_json
from pivotjax.jobs.assemble import DataConfig, ModelConfig
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.models import connectors, language, projector, published, vision
from pivotjax.models.abstract import abstract
from pivotjax.models.language import DecoderConfig
from pivotjax.models.processors import Normalisation, load_processor
from pivotjax.models.vision import Features, efficientnet_lite
from pivotjax.progress import say
from pivotjax.tpu import flops
from pivotjax.tpu.compile import Described
from pivotjax.tpu.flops import Work
from pivotjax.training.optimizer import TrainingConfig
from pivotjax.training.step import Network

_EXPERTS = 4  # of a scenario that is not there yet


def experts(config: PretrainConfig, given: int) -> tuple[int, int]:
    """How many experts a recipe trains, and how many rows of samples of each a step takes."""
    data = config.data
    if given:
        domains = given
    elif data.scenario is None:
        domains = len(data.named)
    elif data.scenario.exists():
        domains = len(read_json(data.scenario / MANIFEST)["domains"])
    else:
        domains = _EXPERTS
        say(f"the scenario {data.scenario} is not there yet: {domains} experts are assumed (--experts changes it)")
    each = config.training.batch // data.pack
    return (1, domains * each) if config.joint else (domains, each)


def described(model: ModelConfig, data: DataConfig, training: TrainingConfig, sizes: tuple[int, int]) -> Described:
    """The step of `sizes` experts and rows of each.

    InputError where a model is neither there nor among the published.
    """
    dtype = jnp.dtype(model.dtype)
    chosen = Features(model.select_layer, model.select_features, connectors.spatial(model.projector.kind))
    tower = _tower(model.vision, chosen, dtype)
    decoder = _decoder(model.language, dtype)
    online = data.features == "online"
    encoder = tower.graphdef, tower.params, chosen, tower.normalise, tower.image_size
    head = _before_captions(model.language, data, tower.tokens)
    images = data.pack
    length, targets = rows.sizes(head - 1, data.max_caption, images, data.row_tokens if images > 1 else 0)
    w0 = jax.eval_shape(
        lambda key: projector.init(model.projector.kind, tower.dim, decoder.config.dim, key, 1.0), jax.random.key(0)
    )
    pixels = jax.ShapeDtypeStruct((tower.image_size, tower.image_size, 3), jnp.uint8)
    features = jax.ShapeDtypeStruct((tower.tokens, tower.dim), jnp.dtype(data.cache_dtype))
    frozen = {"language": decoder.params} | ({"vision": tower.params} if online else {})
    return Described(
        network=Network(decoder.graphdef, tower.graphdef if online else None, chosen, tower.normalise),
        frozen=frozen,
        w0=w0,
        decoder=decoder.config,
        image_flops=flops.of_image(*encoder) if online else 0.0,
        image=pixels if online else features,
        work=Work(*sizes, images, tower.tokens, length, targets, online),
        training=training,
    )


class _Decoder(NamedTuple):
    """A language model without its weights."""

    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: Any


class _Tower(NamedTuple):
    """A vision encoder without its weights."""

    graphdef: nnx.GraphDef
    params: Any
    image_size: int
    tokens: int
    dim: int
    normalise: Normalisation | None


def _decoder(name: str, dtype: Any) -> _Decoder:
    settings, where = _settings(name, published.LANGUAGE, "language")
    family = language.family_of(settings.get("model_type"), where)
    config = family.config(settings, where)
    return _Decoder(config, *language.abstract(family, config, dtype))


def _tower(name: str, chosen: Features, dtype: Any) -> _Tower:
    if name == "efficientnet-lite0":
        sizes = efficientnet_lite.LITE0
        network = abstract(lambda: efficientnet_lite.EfficientNetLite(sizes, rngs=nnx.Rngs(0)))
        tokens = connectors.num_tokens(chosen.kind, efficientnet_lite.NUM_TOKENS)
        return _Tower(*network, sizes.image_size, tokens, connectors.width(chosen.kind, sizes.head), None)
    settings, where = _settings(name, published.VISION, "vision")
    kind = settings.get("model_type")
    if kind not in vision.FAMILIES:
        known = ", ".join(vision.FAMILIES)
        raise InputError(f"{where}: model_type {kind!r} is no known vision encoder; known: {known}")
    config = vision.FAMILIES[kind].config(settings, where)
    vision.depth_of(chosen.select_layer, config.num_layers)
    tokens = config.num_patches + (chosen.select_features == "cls_patch" and config.has_class_token)
    return _Tower(
        *vision.abstract(vision.FAMILIES[kind], config, dtype),
        config.image_size,
        connectors.num_tokens(chosen.kind, tokens),
        connectors.width(chosen.kind, config.dim),
        _normalisation(name),
    )


def _settings(name: str, models: dict[str, published.Published], part: str) -> tuple[dict[str, Any], str]:
    """The fields of config.json, and where they are from."""
    file = Path(name) / "config.json"
    if file.is_file():
        return read_json(file), str(file)
    known = published.find(models, name)
    if known is None:
        raise InputError(
            f"model.{part}: {name!r} is no folder with a config.json, and its sizes are not known; give a folder, or "
            f"one of: {', '.join(models)}"
        )
    return dict(known.settings), known.source


def _normalisation(name: str) -> Normalisation:
    if Path(name).is_dir():
        return load_processor(Path(name)).normalise
    return Normalisation(1 / 255, **published.find(published.VISION, name).pixels)


def _before_captions(name: str, data: DataConfig, visual: int) -> int:
    """Tokens that stand before a caption; without a tokenizer each character of the prompt counts as one."""
    if Path(name).is_dir() and language.has_tokenizer(Path(name)):
        tokenizer = language.read_tokenizer(Path(name))
        return len(Captioner(tokenizer, -1, data.prompt, visual, data.max_caption, data.template).head)
    known = published.find(published.LANGUAGE, name)
    return visual + (int(known is not None and known.begins) if data.template == "plain" else len(data.prompt))
