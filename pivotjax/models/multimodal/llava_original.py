"""The layout of the LLaVA repository: one language model's config.json and tensors, with `mm_` ones beside them.

A checkpoint of `LlavaLlamaForCausalLM` (or Mistral, Qwen2) is the same network as transformers' `llava`, or, where
images are cut into tiles, `llava_next`. Here the two ways of writing it are put side by side: fields of config.json
(`hugging_face_settings`, `original_settings`), tensor names (`names`) and rows of the vocabulary (`original_rows`,
`hugging_face_rows`, `resized`). The vision tower is often not in the checkpoint; its own folder supplies it.

Source: https://github.com/haotian-liu/LLaVA, `llava/model`, and transformers' `convert_llava_weights_to_hf.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pivotjax.checkpoints.names import Names, Rule, Transform, identity, transposed
from pivotjax.errors import InputError
from pivotjax.models import language, projector, vision
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.parts import joined

Fields = Mapping[str, Any]

# `model_type` of config.json here, and of the language model in it.
_TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ARCHITECTURES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
# Fields that are not the language model's.
_OURS = ("image_aspect_ratio", "image_grid_pinpoints", "use_mm_proj", "model_type", "architectures", "auto_map")
_PREFIXES = ("mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "image_crop_resolution", "image_split_resolution")
TOWER = "model.vision_tower.vision_tower."  # before the names of a tower that is inside the checkpoint
_TILED = "spatial_unpad"  # mm_patch_merge_type
_MULTIPLE = 64  # of rows, to which transformers' conversion pads a vocabulary


def is_original(settings: Fields) -> bool:
    """Whether a config.json is of the LLaVA repository's layout."""
    return "mm_projector_type" in settings or "mm_vision_tower" in settings


def hugging_face_settings(settings: Fields, vision_config: Fields, image_token: int, where: str) -> dict[str, Any]:
    """config.json as transformers has it.

    A projector that transformers' class does not have (anything but two layers) is kept as `mm_projector_type`, which
    our `llava` family reads and transformers does not.

    Args:
        settings: config.json of the LLaVA repository's layout.
        vision_config: of the vision tower (`model_type` `clip_vision_model` or `siglip_vision_model`).
        image_token: the id that stands for an image; a checkpoint here has none.
        where: names the file in errors.
    """
    _check_supported(settings, where)
    text = {k: v for k, v in settings.items() if k not in _OURS and not k.startswith(_PREFIXES)}
    kind = settings.get("mm_projector_type") or "linear"
    tower = vision.FAMILIES[vision_config["model_type"]].config(vision_config, where)
    drop_first = tower.has_class_token and settings.get("mm_vision_select_feature") != "cls_patch"
    tiled = settings.get("mm_patch_merge_type") == _TILED
    made = {
        "model_type": "llava_next" if tiled else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if tiled else "LlavaForConditionalGeneration"],
        "text_config": {"model_type": _TEXT_TYPES[settings["model_type"]], **text},
        "vision_config": dict(vision_config),
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": settings.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if drop_first else "full",
        "image_seq_length": tower.num_patches + tower.has_class_token - drop_first,
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings", False)),
    }
    if kind != "mlp2x_gelu":
        made["mm_projector_type"] = kind
    if tiled:  # the LLaVA repository gives width before height
        made["image_grid_pinpoints"] = [[h, w] for w, h in settings["image_grid_pinpoints"]]
    return made | {key: settings[key] for key in ("torch_dtype", "dtype") if key in settings}


def tower_folder(path: Path, settings: Fields, given: Path | None) -> Path:
    """Where the vision tower of the checkpoint at `path` lies: where it was `given`, else where `mm_vision_tower` says.

    InputError if that is no folder.
    """
    named = settings.get("mm_vision_tower") or ""
    if given is None and named and (path / named).is_dir():  # absolute, or beside the checkpoint's files
        return path / named
    if given is None:
        raise InputError(f"{path} names its vision tower {named!r}, which is no folder here; give it (--vision)")
    if not given.is_dir():
        raise InputError(f"there is no vision tower at {given}; give the folder of a CLIP or SigLIP")
    return given


def tower_settings(fields: Fields, where: str) -> dict[str, Any]:
    """`vision_config` from config.json of a vision tower's folder: of CLIP or SigLIP, the tower alone or the whole."""
    kind = fields.get("model_type")
    if kind in ("clip", "siglip"):  # early ones repeat themselves in `vision_config_dict`
        nested = (fields.get("vision_config") or {}) | (fields.get("vision_config_dict") or {})
        return {**nested, "model_type": f"{kind}_vision_model"}
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise InputError(f"{where}: {kind!r} is no vision tower that LLaVA has; give the folder of a CLIP or SigLIP")
    return {key: value for key, value in fields.items() if key != "architectures"}


def _check_supported(settings: Fields, where: str) -> None:
    if settings.get("model_type") not in _TEXT_TYPES:
        raise InputError(f"{where}: model_type {settings.get('model_type')!r} is not supported in the LLaVA "
                         f"repository's layout; known: {', '.join(_TEXT_TYPES)}")
    kind = settings.get("mm_projector_type") or "linear"
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", kind):
        raise InputError(f"{where}: mm_projector_type {kind!r} is not supported; known: linear and mlpNx_gelu")
    known = {
        "mm_vision_select_feature": (None, "patch", "cls_patch"),
        "mm_use_im_start_end": (None, False),
        "mm_use_im_patch_token": (None, False),
        "mm_resampler_type": (None,),
        "mm_patch_merge_type": (None, "flat", _TILED),
    }
    for field, values in known.items():
        if settings.get(field) not in values:
            raise InputError(f"{where}: {field} {settings[field]!r} is not supported; known: "
                             f"{', '.join(str(value) for value in values if value is not None) or 'none'}")
    merge, aspect = settings.get("mm_patch_merge_type"), settings.get("image_aspect_ratio")
    if (merge == _TILED) != (aspect == "anyres") or (merge == _TILED and not settings.get("image_grid_pinpoints")):
        raise InputError(f"{where}: mm_patch_merge_type {merge!r} with image_aspect_ratio {aspect!r} is not supported; "
                         f"tiles need {_TILED}, anyres and image_grid_pinpoints")


def original_settings(
    settings: Fields, vision_tower: str, rows: int, where: str, before: Fields | None = None
) -> dict[str, Any]:
    """config.json of the LLaVA repository's layout from transformers' one, of a `llava` or `llava_next` model.

    Args:
        settings: transformers' config.json.
        vision_tower: what `mm_vision_tower` is to say: a hub id or a path, which LLaVA opens.
        rows: of the vocabulary (`original_rows`).
        where: names the file in errors.
        before: the LLaVA repository's config.json that the model came with, whose fields stay as they are.

    Raises:
        InputError: the model uses what LLaVA cannot express.
    """
    text = settings["text_config"]
    tower = vision.FAMILIES[settings["vision_config"]["model_type"]].config(settings["vision_config"], where)
    layer = settings.get("vision_feature_layer", -2)
    strategy = settings.get("vision_feature_select_strategy", "default")
    classless = not tower.has_class_token
    cannot = {
        f"the language model {text.get('model_type')!r}": text.get("model_type", "llama") not in _ARCHITECTURES,
        f"vision_feature_layer {layer}": not isinstance(layer, int),
        "multimodal_projector_bias false": not settings.get("multimodal_projector_bias", True),
        f"projector_hidden_act {settings.get('projector_hidden_act')!r}":
            settings.get("projector_hidden_act", "gelu") != "gelu",
        f"vision_feature_select_strategy {strategy!r} without a class token": classless and strategy == "default",
    }  # fmt: skip
    for what, true in cannot.items():
        if true:
            raise InputError(f"{where}: the LLaVA repository's layout has no way to say {what}; keep transformers' one")
    model_type, architecture = _ARCHITECTURES[text.get("model_type", "llama")]
    kept = {k: v for k, v in text.items() if k not in ("architectures", "_name_or_path")}
    if (kept.get("pad_token_id") or 0) >= rows:  # of a row that is dropped
        del kept["pad_token_id"]
    made = kept | _older_fields(settings, text) | {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": rows,
        "use_mm_proj": True,
        "mm_vision_tower": vision_tower,
        "mm_projector_type": settings.get("mm_projector_type", "mlp2x_gelu"),
        "mm_hidden_size": tower.dim,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch" if classless or strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }
    if settings["model_type"] == "llava_next":
        made |= {"mm_patch_merge_type": _TILED, "image_aspect_ratio": "anyres",
                 "image_grid_pinpoints": [[w, h] for h, w in settings["image_grid_pinpoints"]]}  # fmt: skip
    return made | dict(before or {}) | {"mm_vision_tower": vision_tower, "vocab_size": rows}


def _older_fields(settings: Fields, text: Fields) -> dict[str, Any]:
    """What transformers 5 says in other fields than version 4, with which the LLaVA repository works."""
    made: dict[str, Any] = {}
    dtype = settings.get("torch_dtype") or settings.get("dtype")
    if dtype is not None:
        made["torch_dtype"] = dtype
    if rope := text.get("rope_parameters"):
        made["rope_theta"] = rope.get("rope_theta", 10000.0)
        if rope.get("rope_type", "default") != "default":
            made["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    return made


def names(config: MultimodalConfig, tower: bool = True) -> Names:
    """The table of tensor names; without `tower` the vision tower is left to its own folder.

    The projector is an `nn.Sequential` whose activations count, hence its even numbers; one layer alone has none.
    """
    decoder = language.FAMILIES[config.language_type].names(config.language).within("language", "")
    numbers = [""] if config.connector == "linear" else [f".{2 * i}" for i in range(projector.depth(config.connector))]
    rules = [
        Rule(f"projector/linear_{i}/{leaf}", (f"model.mm_projector{number}.{key}",), transform)
        for i, number in enumerate(numbers)
        for leaf, key, transform in (("kernel", "weight", transposed), ("bias", "bias", identity))
    ]
    if config.grids:
        rules.append(Rule("image_newline", ("model.image_newline",)))
    if not tower:
        return joined(decoder, rules=tuple(rules))
    return joined(
        decoder, vision.FAMILIES[config.vision_type].names(config.vision).within("vision", TOWER), rules=tuple(rules)
    )


def original_rows(vocab_size: int, image_token: int, tokens: Mapping[str, int]) -> int:
    """Rows of the vocabulary that a model of `vocab_size` rows has in the LLaVA repository's layout.

    Rows are dropped only if transformers' conversion has added them: all from the image token's on, where no token but
    the image's and the padding's has one, and no more than the padding to a multiple of 64. Otherwise all stay.

    Args:
        vocab_size: rows that there are.
        image_token: id of the image token.
        tokens: the tokenizer's whole vocabulary, added tokens included; empty where it is not known.
    """
    others = [number for token, number in tokens.items() if number != image_token and token != "<pad>"]
    first = max(others, default=vocab_size) + 1
    return first if first == image_token and vocab_size <= _padded(first + 2) else vocab_size


def hugging_face_rows(vocab_size: int, image_token: int) -> int:
    """Rows of the vocabulary that transformers' layout needs: one for the image token, and as its conversion does
    one for a padding token and some up to a multiple of 64. None are added where there is room already."""
    return vocab_size if image_token < vocab_size else _padded(image_token + 2)


def _padded(rows: int) -> int:
    return -(-rows // _MULTIPLE) * _MULTIPLE


def image_token_of(vocab_size: int, tokens: Mapping[str, int]) -> int:
    """The id that stands for an image: the tokenizer's own, else the first that no token has."""
    return tokens.get("<image>", max(tokens.values(), default=vocab_size - 1) + 1)


def resized(names: Names, ours: int, theirs: int) -> Names:
    """The table of a checkpoint whose vocabulary has `theirs` rows, for a model that has `ours`.

    Rows that are missing on the side that is made are the mean of those there: no image or padding token is ever the
    likeliest then, and nothing that is compared with them is far off. Rows that are too many are left out.
    """
    at = {"language/embedding": 0, "language/head/kernel": 0}

    def between(rule: Rule) -> Rule:
        if rule.path not in at:
            return rule
        forward, inverse = rule.transform
        return replace(
            rule,
            transform=Transform(lambda tensor: forward(_rows(tensor, ours)), lambda leaf: _rows(inverse(leaf), theirs)),
        )

    return replace(names, rules=tuple(map(between, names.rules)))


def _rows(tensor: np.ndarray, count: int) -> np.ndarray:
    """A matrix `[rows, dim]` with `count` rows."""
    if count <= len(tensor):
        return tensor[:count]
    mean = tensor.mean(0, dtype=np.float32, keepdims=True).astype(tensor.dtype)
    return np.concatenate([tensor, np.repeat(mean, count - len(tensor), 0)])
