"""Phi-3, Phi-3.5 and Phi-4 mini (`model_type` "phi3"): Llama with fused projections."""

from pivotjax.models.language.family import Family
from pivotjax.models.language.phi3.config import config
from pivotjax.models.language.phi3.names import names

FAMILY = Family(config, names)
