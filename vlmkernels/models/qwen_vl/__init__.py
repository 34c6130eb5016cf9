"""Qwen-VL: read config, vision, projector, language, model, in this order."""

from .config import QwenVisionConfig, QwenVLConfig
from .model import QwenVL

__all__ = ["QwenVL", "QwenVLConfig", "QwenVisionConfig"]
