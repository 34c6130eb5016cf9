"""Qwen2-VL: read config, vision, projector, language, model, in this order."""

from .config import Qwen2VLConfig, Qwen2VLVisionConfig
from .language import Qwen2VLLanguage
from .model import Qwen2VL
from .positions import mrope_position_ids
from .processor import Qwen2VLProcessor
from .projector import PatchMerger
from .vision import Qwen2VLVision

__all__ = [
    "PatchMerger",
    "Qwen2VL",
    "Qwen2VLConfig",
    "Qwen2VLLanguage",
    "Qwen2VLProcessor",
    "Qwen2VLVision",
    "Qwen2VLVisionConfig",
    "mrope_position_ids",
]
