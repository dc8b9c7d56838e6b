"""Qwen2 and Qwen2.5 (`model_type` "qwen2"): Llama with biases of queries, keys and values."""

from pivotjax.models.language.family import Family
from pivotjax.models.language.qwen2.config import config
from pivotjax.models.language.qwen2.names import names

FAMILY = Family(config, names)
