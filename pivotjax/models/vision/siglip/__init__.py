"""SigLIP's and SigLIP 2's image towers, of one image size and of any (NaFlex)."""

from pivotjax.models.vision.family import Family
from pivotjax.models.vision.siglip.config import config, naflex_config, whole_config, whole_naflex_config
from pivotjax.models.vision.siglip.names import names, whole_names

FAMILY = Family(config, names)
WHOLE_FAMILY = Family(whole_config, whole_names)
NAFLEX_FAMILY = Family(naflex_config, names)
WHOLE_NAFLEX_FAMILY = Family(whole_naflex_config, whole_names)
