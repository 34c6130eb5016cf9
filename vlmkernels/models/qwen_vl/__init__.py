"""Qwen-VL: read config, vision, projector, language, model, in this order."""

from .boxes import Region, draw, parse
from .config import QwenVisionConfig, QwenVLConfig
from .model import QwenVL
from .processor import QwenVLProcessor
from .tokenizer import QwenTokenizer

__all__ = [
    "QwenTokenizer",
    "QwenVL",
    "QwenVLConfig",
    "QwenVLProcessor",
    "QwenVisionConfig",
    "Region",
    "draw",
    "parse",
]
