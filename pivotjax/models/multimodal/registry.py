"""The families of whole models."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from pivotjax.errors import InputError
from pivotjax.models import language
from pivotjax.models.abstract import abstract as abstract_of
from pivotjax.models.multimodal import idefics3, llava, llava_next, text
from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.network import MultimodalConfig

# Keyed by config.json's `model_type`.
FAMILIES: dict[str, Family] = {
    "idefics3": idefics3.FAMILY,
    "llava": llava.FAMILY,
    "llava_next": llava_next.FAMILY,
    "smolvlm": idefics3.FAMILY,
}


def family_of(settings: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; InputError where there is none."""
    kind = settings.get("model_type")
    if kind in language.FAMILIES:
        return text.FAMILY
    if kind not in FAMILIES:
        known = ", ".join((*FAMILIES, *language.FAMILIES))
        raise InputError(f"{where}: architecture {kind!r} is not supported; known: {known}")
    return FAMILIES[kind]


def abstract(family: Family, config: MultimodalConfig, dtype) -> tuple[nnx.GraphDef, dict]:
    """The network's graph and its parameters as shapes only; nothing is allocated."""
    return abstract_of(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
