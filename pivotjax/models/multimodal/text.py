"""Language models alone, as whole models that take no images."""

from collections.abc import Mapping
from typing import Any

from pivotjax.checkpoints.names import Names
from pivotjax.errors import InputError
from pivotjax.models import language
from pivotjax.models.multimodal.family import Family, Images
from pivotjax.models.multimodal.network import MultimodalConfig


def _config(fields: Mapping[str, Any], where: str) -> MultimodalConfig:
    kind = fields["model_type"]
    return MultimodalConfig(language_type=kind, language=language.family_of(kind, where).config(fields, where))


def _names(config: MultimodalConfig) -> Names:
    return language.FAMILIES[config.language_type].names(config.language).within("language", "")


def _no_images(*_: Any) -> Images:
    raise InputError("this is a language model alone; it takes no images")


FAMILY = Family(_config, _names, arrange=_no_images, process=_no_images, placeholder=_no_images)
