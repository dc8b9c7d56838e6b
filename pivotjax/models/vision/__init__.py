"""Vision encoders: one loader for Hugging Face folders and EfficientNet-Lite's weights, and a registry of families."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pivotjax.checkpoints import names
from pivotjax.checkpoints.pickles import read_state_dict
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.errors import InputError
from pivotjax.files import read_json, sha256
from pivotjax.models import connectors
from pivotjax.models.abstract import abstract as abstract_of
from pivotjax.models.processors import Normalisation, load_processor
from pivotjax.models.vision import clip, efficientnet_lite, idefics3, siglip
from pivotjax.models.vision.family import Family
from pivotjax.models.vision.vit import VisionConfig, VisionTransformer

__all__ = [
    "FAMILIES", "Encoder", "Family", "Features", "VisionConfig", "VisionTransformer", "abstract", "depth_of", "encode",
    "in_dtype", "load_encoder", "select", "visual_features",
]  # fmt: skip

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "clip_vision_model": clip.FAMILY,
    "clip": clip.WHOLE_FAMILY,
    "siglip_vision_model": siglip.FAMILY,
    "siglip": siglip.WHOLE_FAMILY,
    "siglip2_vision_model": siglip.NAFLEX_FAMILY,
    "siglip2": siglip.WHOLE_NAFLEX_FAMILY,
    "idefics3_vision": idefics3.FAMILY,
    "smolvlm_vision": idefics3.FAMILY,
}
_EFFICIENTNET = "_conv_stem.weight"  # a tensor that only it has: a state dict does not say what it is


class Features(NamedTuple):
    """Which features an encoder gives.

    Fields:
        select_layer: hidden states of a vision transformer after this layer; -1 is the last one, -2 that before it.
        select_features: `patch` tokens alone, or `cls_patch`: the class token before them.
        kind: a projector's; its spatial reduction (`connectors.reduce`) is part of the features.
    """

    select_layer: int = -2
    select_features: Literal["patch", "cls_patch"] = "patch"
    kind: str = "linear"


class Encoder(NamedTuple):
    """A frozen vision encoder: `nnx.merge(graphdef, params)` is the network."""

    name: str
    graphdef: nnx.GraphDef
    params: dict  # nested dict of float32 arrays
    image_size: int  # pixels on a side
    num_tokens: int  # visual tokens of one image
    dim: int  # channels of one visual token
    identity: str  # SHA-256 of the weights and of all else that features depend on
    features: Features = Features()
    normalise: Normalisation | None = None  # of pixels, as the model's processor says; None: the network does it


def load_encoder(path: Path, features: Features | None = None) -> Encoder:
    """Loads a CLIP or SigLIP from its Hugging Face folder, or the `.pth` state dict of an EfficientNet-Lite0.

    InputError if it is missing, damaged, would run code, is another network, or cannot give such features.
    """
    path, chosen = Path(path), features or Features()
    chosen = chosen._replace(kind=connectors.spatial(chosen.kind))
    return _load_folder(path, chosen) if path.is_dir() else _load_efficientnet_lite(path, chosen)


def in_dtype(encoder: Encoder, dtype) -> Encoder:
    """A vision transformer with weights and arithmetic in another type; other networks as they are."""
    network = nnx.merge(encoder.graphdef, encoder.params)
    if not isinstance(network, VisionTransformer):
        return encoder
    graphdef, shapes = abstract_of(lambda: VisionTransformer(network.config, dtype=dtype, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), encoder.params, shapes)
    return encoder._replace(graphdef=graphdef, params=params)


def encode(encoder: Encoder, images: UInt8[Array, "B S S 3"]) -> Float[Array, "B T D"]:
    """Visual features, float32: `num_tokens` tokens of `dim` channels. Compiled once a batch size.

    A vision transformer's are its hidden states, as they are; EfficientNet-Lite's its last map pooled to 4 x 4 tokens,
    each normalised over its channels. InputError if the images are not uint8 of the encoder's size.
    """
    side = encoder.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != jnp.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"the encoder takes images as uint8 [B, {side}, {side}, 3], not {found}; resize them first")
    return _encode(encoder.graphdef, encoder.features, encoder.normalise, encoder.params, images)


def visual_features(
    graphdef: nnx.GraphDef,
    chosen: Features,
    normalise: Normalisation | None,
    params: dict,
    images: UInt8[Array, "B S S 3"],
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Float[Array, "B T D"]:
    """What `encode` computes, for use inside a larger program; in the parameters' type. `place` says where a vision
    transformer's hidden states live on a mesh."""
    network = nnx.merge(graphdef, params)
    if normalise is None:
        tokens = network.tokens(images)
    else:
        pixels = (images * jnp.float32(normalise.factor) - jnp.array(normalise.mean)) / jnp.array(normalise.std)
        tokens = select(network, pixels, chosen, place)
    return connectors.reduce(chosen.kind, tokens)


_encode = jax.jit(visual_features, static_argnums=(0, 1, 2))


def select(
    tower: VisionTransformer,
    pixels: Float[Array, "B H W 3"],
    chosen: Features,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Float[Array, "B T D"]:
    """Hidden states of the chosen layer, before any spatial reduction, of normalised images."""
    hidden = tower(pixels, depth=depth_of(chosen.select_layer, tower.config.num_layers), place=place)
    return hidden[:, 1:] if tower.config.has_class_token and chosen.select_features == "patch" else hidden


def depth_of(select_layer: int, num_layers: int) -> int:
    """How many layers have to run for the hidden states of `select_layer` (0: the embedding; -1: the last layer)."""
    depth = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= depth <= num_layers:
        raise InputError(
            f"select_layer {select_layer} is none of a tower of {num_layers}; use {-num_layers - 1} to {num_layers}"
        )
    return depth


def abstract(family: Family, config: VisionConfig, dtype=jnp.float32) -> tuple[nnx.GraphDef, dict]:
    """The network's graph and its parameters as shapes only; nothing is allocated."""
    return abstract_of(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _load_folder(path: Path, chosen: Features) -> Encoder:
    settings, where = read_json(path / "config.json"), str(path / "config.json")
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is no known vision encoder; known: {', '.join(FAMILIES)}")
    config = FAMILIES[kind].config(settings, where)
    depth_of(chosen.select_layer, config.num_layers)
    if chosen.select_features == "cls_patch" and not config.has_class_token:
        raise InputError(f"{path} has no class token, so select_features cannot be cls_patch; use patch")
    tokens = config.num_patches + (chosen.select_features == "cls_patch")
    count = connectors.num_tokens(chosen.kind, tokens)

    normalise = load_processor(path).normalise
    graphdef, shapes = abstract(FAMILIES[kind], config)
    with open_checkpoint(path) as tensors:
        params = names.load(tensors, FAMILIES[kind].names(config), shapes, where=str(path))
        identity = _digest(*tensors.digests().values(), config, chosen, normalise)
    dim = connectors.width(chosen.kind, config.dim)
    return Encoder(path.name, graphdef, params, config.image_size, count, dim, identity, chosen, normalise)


def _load_efficientnet_lite(path: Path, chosen: Features) -> Encoder:
    tensors, config = read_state_dict(path), efficientnet_lite.LITE0
    if _EFFICIENTNET not in tensors:
        raise InputError(
            f"{path} is no known vision encoder; give the torch state dict of an EfficientNet-Lite0, or the Hugging "
            "Face folder of a CLIP or SigLIP"
        )
    if chosen != Features(kind=chosen.kind):
        raise InputError(f"{path} has one map of features and no class token; leave out select_layer, select_features")
    graphdef, shapes = abstract_of(lambda: efficientnet_lite.EfficientNetLite(config, rngs=nnx.Rngs(0)))
    params = names.load(tensors, efficientnet_lite.names(), shapes, where=str(path))
    identity = sha256(path)
    return Encoder(
        name=path.stem,
        graphdef=graphdef,
        params=params,
        image_size=config.image_size,
        num_tokens=connectors.num_tokens(chosen.kind, efficientnet_lite.NUM_TOKENS),
        dim=connectors.width(chosen.kind, config.head),
        identity=identity if chosen == Features() else _digest(identity, chosen.kind),
        features=chosen,
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
