"""ViT: read config, vision, model, in this order."""

from .config import ViTConfig
from .model import ViT, ViTOutput
from .processor import ViTProcessor
from .vision import ViTVision

__all__ = ["ViT", "ViTConfig", "ViTOutput", "ViTProcessor", "ViTVision"]
