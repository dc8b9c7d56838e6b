"""Llama 1, 2 and 3, Vicuna, TinyLlama, SmolLM2 and others (`model_type` "llama"); also as GGUF."""

from pivotjax.models.language.family import Family
from pivotjax.models.language.llama import gguf
from pivotjax.models.language.llama.config import config
from pivotjax.models.language.llama.names import names

FAMILY = Family(config, names)
GGUF_FAMILY = Family(gguf.config, gguf.names)
