"""Whole multimodal models: a registry of families, and a loader for all that `pivotjax convert` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pivotjax.checkpoints import names
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.files import read_json
from pivotjax.models.multimodal import idefics3, llava, llava_next
from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.model import Model
from pivotjax.models.multimodal.network import Multimodal, MultimodalConfig

__all__ = ["FAMILIES", "Family", "Model", "Multimodal", "MultimodalConfig", "abstract", "load_model"]

# Keyed by config.json's `model_type`.
FAMILIES: dict[str, Family] = {
    "idefics3": idefics3.FAMILY,
    "llava": llava.FAMILY,
    "llava_next": llava_next.FAMILY,
    "smolvlm": idefics3.FAMILY,
}


def load_model(path: str | Path, dtype=jnp.float32, shardings=None, vision: str | Path | None = None) -> Model:
    """Draft."""
    folder = Path(path)
    settings = read_json(folder / "config.json")
    where = str(folder / "config.json")
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings, where)
    graphdef, shapes = abstract(family, config, dtype)
    params = names.load(open_checkpoint(folder), family.names(config), shapes, where=str(folder))
    return Model(family, config, graphdef, params, _stop(folder, settings), _pad(settings), folder)


def abstract(family: Family, config: MultimodalConfig, dtype) -> tuple[nnx.GraphDef, dict]:
    """The network's graph and its parameters as shapes only; nothing is allocated."""
    module = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _stop(folder: Path, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json, else of the language model in it."""
    file = folder / "generation_config.json"
    held = (read_json(file) if file.is_file() else {}, settings, settings.get("text_config") or {})
    found = next((one["eos_token_id"] for one in held if one.get("eos_token_id") is not None), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _pad(settings: Mapping[str, Any]) -> int:
    held = (settings, settings.get("text_config") or {})
    return next((one["pad_token_id"] for one in held if one.get("pad_token_id") is not None), 0)
