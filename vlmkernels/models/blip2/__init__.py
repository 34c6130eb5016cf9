"""BLIP-2: read config, vision, qformer, base, model; of the first stage retrieval, pretraining."""

from .config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from .model import Blip2, Blip2OPT, Blip2T5
from .pretraining import Blip2Pretraining, PretrainingOutput
from .processor import QUESTION_ANSWER, Blip2Processor, BlipImageSettings
from .qformer import QFormer
from .retrieval import Blip2Retrieval, RetrievalOutput
from .vision import Blip2Vision

__all__ = [
    "QUESTION_ANSWER",
    "Blip2",
    "Blip2Config",
    "Blip2OPT",
    "Blip2Pretraining",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2Retrieval",
    "Blip2T5",
    "Blip2Vision",
    "Blip2VisionConfig",
    "BlipImageSettings",
    "PretrainingOutput",
    "QFormer",
    "RetrievalOutput",
]
