"""BLIP-2: read config, vision, qformer, language, model, then the first stage: retrieval,
pretraining."""

from .config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from .pretraining import Blip2Pretraining, PretrainingOutput
from .qformer import QFormer
from .retrieval import Blip2Retrieval, RetrievalOutput
from .vision import Blip2Vision

__all__ = [
    "Blip2Config",
    "Blip2Pretraining",
    "Blip2QFormerConfig",
    "Blip2Retrieval",
    "Blip2Vision",
    "Blip2VisionConfig",
    "PretrainingOutput",
    "QFormer",
    "RetrievalOutput",
]
