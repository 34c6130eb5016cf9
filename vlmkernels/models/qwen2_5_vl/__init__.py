"""Qwen2.5-VL: Qwen2-VL with another vision tower and absolute time. Read config, vision, model."""

from .config import Qwen25VLConfig, Qwen25VLVisionConfig
from .model import Qwen25VL
from .processor import Qwen25VLProcessor
from .vision import Qwen25VLVision, window_order

__all__ = [
    "Qwen25VL",
    "Qwen25VLConfig",
    "Qwen25VLProcessor",
    "Qwen25VLVision",
    "Qwen25VLVisionConfig",
    "window_order",
]
