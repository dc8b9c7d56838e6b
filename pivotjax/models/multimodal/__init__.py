"""Whole multimodal models: a registry of families, and a loader for all that `pivotjax convert` reads."""

from pivotjax.models.multimodal.family import Family
from pivotjax.models.multimodal.loading import is_model, load_model
from pivotjax.models.multimodal.model import Model
from pivotjax.models.multimodal.network import Multimodal, MultimodalConfig
from pivotjax.models.multimodal.registry import FAMILIES, abstract, family_of

__all__ = [
    "FAMILIES", "Family", "Model", "Multimodal", "MultimodalConfig", "abstract", "family_of", "is_model",
    "load_model",
]  # fmt: skip
