"""Qwen3 (`model_type` "qwen3"): Llama with normalised queries and keys."""

from pivotjax.models.language.family import Family
from pivotjax.models.language.qwen3.config import config
from pivotjax.models.language.qwen3.names import names

FAMILY = Family(config, names)
