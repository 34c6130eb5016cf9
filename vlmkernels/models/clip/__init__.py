"""CLIP: read config, towers, model, in this order."""

from .config import ClipConfig, ClipTextConfig, ClipVisionConfig
from .model import Clip, ClipOutput
from .processor import ClipProcessor
from .towers import ClipText, ClipVision
from .zero_shot import ZeroShotClassifier

__all__ = [
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "ClipProcessor",
    "ClipText",
    "ClipTextConfig",
    "ClipVision",
    "ClipVisionConfig",
    "ZeroShotClassifier",
]
