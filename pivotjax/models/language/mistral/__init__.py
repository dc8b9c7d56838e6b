"""Mistral (`model_type` "mistral"): Llama with a sliding window."""

from pivotjax.models.language.family import Family
from pivotjax.models.language.mistral.config import config
from pivotjax.models.language.mistral.names import names

FAMILY = Family(config, names)
