"""LLaVA-1.5: read config, vision, projector, language, model, in this order."""

from .config import LlavaConfig, LlavaTextConfig
from .model import Llava
from .processor import VICUNA_V1, LlavaProcessor
from .projector import Projector

__all__ = [
    "VICUNA_V1",
    "Llava",
    "LlavaConfig",
    "LlavaProcessor",
    "LlavaTextConfig",
    "Projector",
]
