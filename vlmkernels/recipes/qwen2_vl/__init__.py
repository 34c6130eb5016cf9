"""Qwen2-VL's three stages (arXiv 2409.12191, section 2.2), for Qwen2.5-VL too.

The paper says what is trained in each and not with which settings: these are for fine-tuning.
"""

from __future__ import annotations

from typing import Any

from vlmkernels.models.qwen2_vl import Qwen2VL
from vlmkernels.recipes.stages import Stage, conversation_batch

_ALL: dict[str, Any] = {
    "epochs": 1,
    "batch": 128,
    "lr": 1e-5,
    "warmup": 0.03,
    "micro_batch": 4,
    "max_length": 8192,
    "gradient_checkpointing": True,
}
STAGES = {
    "1": Stage(
        "the vision tower learns, through the frozen language model",
        Qwen2VL,
        published=_ALL | {"frozen": r"(?!visual\.)"},
        collate=conversation_batch,
    ),
    "2": Stage(
        "all parameters learn",
        Qwen2VL,
        published=_ALL,
        collate=conversation_batch,
    ),
    "3": Stage(
        "language model and merger learn from instructions, the vision tower is frozen",
        Qwen2VL,
        published=_ALL | {"frozen": r"visual\.(patch_embed|blocks)\."},
        collate=conversation_batch,
    ),
}
