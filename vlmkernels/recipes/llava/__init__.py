"""LLaVA-1.5's two stages (arXiv 2310.03744; scripts/v1_5 of the original code)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmkernels.models.llava import VICUNA_V1, Llava, LlavaProcessor
from vlmkernels.recipes.stages import (
    Conversation,
    Stage,
    StageSettings,
    answer_of,
    conversation_batch,
    cut,
    only_picture,
)
from vlmkernels.recipes.trainer import Batch


def caption_batch(
    processor: LlavaProcessor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """<image>caption\\n: the caption and the line's end are learnt, what was asked is left out."""
    image = processor.image_token
    texts = [f"{image}{answer_of(messages)}\n" for messages in conversations]
    pictures = [only_picture(messages) for messages in conversations]
    batch = processor(texts, pictures, pad_to_square=False, padding_side="right")
    ids = batch["input_ids"]
    words = (batch["attention_mask"] != 0) & ~torch.isin(ids, torch.tensor(processor.feature_ids))
    words[:, 0] = False  # <s>
    batch["labels"] = ids.masked_fill(~words, -100)
    return cut(batch, settings.max_length, processor.feature_ids)


def chat_batch(
    processor: LlavaProcessor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """Whole conversations, pictures padded to squares so that nothing of them is cut off."""
    return conversation_batch(processor, conversations, settings, pad_to_square=True)


def write_vicuna(processor: LlavaProcessor) -> None:
    processor.tokenizer.chat_template = VICUNA_V1


_BOTH: dict[str, Any] = {
    "epochs": 1,
    "warmup": 0.03,
    "micro_batch": 16,
    "gradient_checkpointing": True,
}
STAGES = {
    "1": Stage(
        "the projector learns from 558k captions",
        Llava,
        published=_BOTH | {"frozen": r"vision_tower\.|language_model\.", "lr": 1e-3, "batch": 256},
        collate=caption_batch,
        captions=True,
    ),
    "2": Stage(
        "projector and language model learn from 665k conversations",
        Llava,
        published=_BOTH | {"frozen": r"vision_tower\.", "lr": 2e-5, "batch": 128},
        collate=chat_batch,
        prepare=write_vicuna,
    ),
}
