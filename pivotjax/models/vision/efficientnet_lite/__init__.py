"""EfficientNet-Lite0, as a torch state dict (`.pth`)."""

from pivotjax.models.vision.efficientnet_lite.config import LITE0
from pivotjax.models.vision.efficientnet_lite.names import names
from pivotjax.models.vision.efficientnet_lite.network import NUM_TOKENS, EfficientNetLite

__all__ = ["LITE0", "NUM_TOKENS", "EfficientNetLite", "names"]
