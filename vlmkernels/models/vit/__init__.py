"""ViT: read config, vision, model, in this order."""

from .config import ViTConfig
from .model import ViT, ViTOutput
from .processor import ViTImageSettings, ViTProcessor
from .vision import ViTVision

__all__ = ["ViT", "ViTConfig", "ViTImageSettings", "ViTOutput", "ViTProcessor", "ViTVision"]
