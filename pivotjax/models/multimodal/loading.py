"""Whole models from files: Hugging Face folders, checkpoints of the LLaVA repository, Orbax checkpoints of models."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Sharding

from pivotjax.checkpoints import folders, hub, model_store, names
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.errors import InputError
from pivotjax.files import check_links, read_json
from pivotjax.models import language
from pivotjax.models import vision as towers
from pivotjax.models.multimodal import llava_original
from pivotjax.models.multimodal.model import Model
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.multimodal.prompts import load_prompts
from pivotjax.models.multimodal.registry import FAMILIES, abstract, family_of
from pivotjax.models.processors import AnyProcessor, AnyResolutionProcessor, Processor, load_processor


def load_model(
    path: str | Path | epath.Path,
    dtype=jnp.float32,
    shardings: Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    vision: str | Path | None = None,
) -> Model:
    """A whole model: LLaVA, LLaVA-NeXT, Idefics3, SmolVLM; also a language model alone.

    Args:
        path: a Hugging Face folder, a checkpoint of the LLaVA repository, or an Orbax checkpoint of a model; also
            `hf://OWNER/NAME`, which is downloaded, and `gs://BUCKET/PATH` of an Orbax checkpoint.
        dtype: of the weights and the arithmetic.
        shardings: `shardings("language/layers/q/kernel", leaf)` says where a leaf goes, tensor by tensor as it is read
            (the axes of its mesh are of type Auto); None: the default device.
        vision: folder of the vision tower, where a checkpoint of the LLaVA repository does not have it inside and the
            path that its config.json names is not there.

    Raises:
        InputError: nothing there, damaged, or of an architecture that is not supported.
    """
    folder, place = hub.located(str(path)), partial(_placed, shardings)
    if model_store.is_model(folder):
        return _load_orbax(folder, dtype, place)
    settings = _settings(folder)
    if llava_original.is_original(settings):
        return _load_original(folder, settings, dtype, place, vision)
    family = family_of(settings, str(folder))
    config = family.config(settings, str(folder / "config.json"))
    graphdef, shapes = abstract(family, config, dtype)
    with open_checkpoint(folder) as tensors:
        params = names.load(tensors, family.names(config), shapes, where=str(folder), shardings=place(shapes))
    return _model(folder, settings, family, config, graphdef, params, partial(load_processor, folder))


def is_model(path: Path | epath.Path) -> bool:
    """Whether `load_model` would read this: a folder that describes a model, and no projector alone."""
    return (path / folders.CONFIG).is_file() or model_store.is_model(path)


def _settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"there is no model at {folder}; give the folder of a whole model")
    check_links(folder)
    file = folder / folders.CONFIG
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} is not a mapping of fields; get the model's config.json again")
    return found


def _placed(shardings: Callable | None, shapes: Any) -> Any:
    if shardings is None:
        return None
    return jax.tree_util.tree_map_with_path(lambda path, leaf: shardings(names.path_name(path), leaf), shapes)


def _load_orbax(folder: Path | epath.Path, dtype, place: Callable) -> Model:
    with model_store.open_model(folder) as tensors:
        family = family_of(tensors.settings, str(folder))
        config = family.config(tensors.settings, str(folder))
        graphdef, shapes = abstract(family, config, dtype)
        table = family.names(config).ours()
        params = names.load(tensors, table, shapes, where=str(folder), shardings=place(shapes))
    load_images = partial(load_processor, tensors.folder)
    return _model(tensors.folder, tensors.settings, family, config, graphdef, params, load_images)


def _load_original(folder: Path, settings: Mapping, dtype, place: Callable, vision: str | Path | None) -> Model:
    """The LLaVA repository's layout, whose vision tower (or at least its config) lies in a folder of its own."""
    where, given = str(folder / "config.json"), None if vision is None else hub.located(str(vision))
    tower = llava_original.tower_folder(folder, settings, given)
    tower_settings = _settings(tower)
    vocabulary = language.read_tokenizer(folder).get_vocab() if language.has_tokenizer(folder) else {}
    fields = llava_original.hugging_face_settings(
        settings,
        llava_original.tower_settings(tower_settings, str(tower / "config.json")),
        llava_original.image_token_of(settings.get("vocab_size", 0), vocabulary),
        where,
    )
    family = FAMILIES[fields["model_type"]]
    config = family.config(fields, where)
    graphdef, shapes = abstract(family, config, dtype)
    with open_checkpoint(folder) as tensors:
        inside = any(name.startswith(llava_original.TOWER) for name in tensors)
        own = shapes if inside else {part: held for part, held in shapes.items() if part != "vision"}
        table = llava_original.names(config, tower=inside)
        params = names.load(tensors, table, own, where=str(folder), shardings=place(own))
    if not inside:
        params["vision"] = _load_tower(tower, tower_settings, config, shapes["vision"], place)
    load_images = partial(_original_images, tower, settings, config)
    return _model(folder, settings, family, config, graphdef, params, load_images)


def _load_tower(folder: Path, settings: Mapping, config: MultimodalConfig, shapes: dict, place: Callable) -> dict:
    table = towers.FAMILIES[settings["model_type"]].names(config.vision).within("vision", "")
    nested = {"vision": shapes}
    with open_checkpoint(folder) as tensors:
        return names.load(tensors, table, nested, where=str(folder), shardings=place(nested))["vision"]


def _original_images(tower: Path, settings: Mapping, config: MultimodalConfig) -> AnyProcessor:
    """The tower's processor; around it, what LLaVA does to an image first (`image_aspect_ratio`)."""
    found = load_processor(tower)
    if not isinstance(found, Processor):
        return found
    if config.grids:
        size = config.vision.image_size
        return AnyResolutionProcessor(found, (size, size), size, config.grids)
    return found.padded() if settings.get("image_aspect_ratio") == "pad" else found


def _model(folder, settings, family, config, graphdef, params, load_images) -> Model:
    pad = _pad(settings)
    prompts = partial(load_prompts, folder, family, config, pad, load_images)
    return Model(family, config, graphdef, params, _stop(folder, settings), pad, prompts)


def _stop(folder: Path, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json, else of the language model in it."""
    file = folder / "generation_config.json"
    held = (read_json(file) if file.is_file() else {}, settings, settings.get("text_config") or {})
    found = next((one["eos_token_id"] for one in held if one.get("eos_token_id") is not None), ())
    return tuple(found) if isinstance(found, list) else (found,) if isinstance(found, int) else ()


def _pad(settings: Mapping[str, Any]) -> int:
    held = (settings, settings.get("text_config") or {})
    return next((one["pad_token_id"] for one in held if one.get("pad_token_id") is not None), 0)
