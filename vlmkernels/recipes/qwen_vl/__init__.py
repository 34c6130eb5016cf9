"""Qwen-VL's three stages (arXiv 2308.12966, section 3 and appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmkernels.models.qwen_vl import QwenVL, QwenVLProcessor
from vlmkernels.models.qwen_vl.tokenizer import END_OF_TEXT, GROUNDING, IMG_END, IMG_START
from vlmkernels.recipes.stages import (
    Conversation,
    Stage,
    StageSettings,
    answer_of,
    cut,
    only_picture,
)
from vlmkernels.recipes.trainer import Batch


def chat_batch(
    processor: QwenVLProcessor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """Conversations in the checkpoint's format. The model itself runs its tower where there are no
    pictures."""
    batch = processor.for_training(conversations, padding_side="right")
    tags = processor.tokenizer.encode(IMG_START + IMG_END)
    return cut(batch, settings.max_length, tags[:1] + tags[-1:])


def caption_batch(
    processor: QwenVLProcessor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """<img></img>caption<|endoftext|>: what was asked is left out."""
    tokenizer = processor.tokenizer
    image, end = tokenizer.encode(IMG_START + IMG_END), [tokenizer.special[END_OF_TEXT]]
    captions = [
        tokenizer.encode(answer_of(messages), allowed_special=GROUNDING)
        for messages in conversations
    ]
    batch = tokenizer.pad([image + words + end for words in captions], "right")
    batch["pixel_values"] = processor.image([only_picture(m) for m in conversations])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, : len(image)] = -100
    return cut(batch, settings.max_length, image[:1] + image[-1:])


def raw(processor: QwenVLProcessor) -> None:
    processor.chat_format = "raw"


def chatml(processor: QwenVLProcessor) -> None:
    processor.chat_format = "chatml"


_ALL: dict[str, Any] = {"weight_decay": 0.05, "beta2": 0.98, "eps": 1e-6}
STAGES = {
    "1": Stage(
        "vision tower and adapter learn from captions, the language model is frozen",
        QwenVL,
        published=_ALL
        | {"frozen": r"transformer\.|lm_head\.", "steps": 50_000, "batch": 30720}
        | {"lr": 2e-4, "min_lr": 0.005, "warmup": 500},
        collate=caption_batch,
        captions=True,
        prepare=raw,
    ),
    "2": Stage(
        "all parameters learn from questions and answers",
        QwenVL,
        published=_ALL | {"steps": 19_000, "batch": 4096, "lr": 5e-5, "min_lr": 0.2, "warmup": 400},
        collate=chat_batch,
        prepare=raw,
    ),
    "3": Stage(
        "adapter and language model learn from conversations, the vision tower is frozen",
        QwenVL,
        published=_ALL
        | {"frozen": r"visual\.(?!attn_pool\.)", "steps": 8_000, "batch": 128}
        | {"lr": 1e-5, "min_lr": 0.1, "warmup": 3000},
        collate=chat_batch,
        prepare=chatml,
    ),
}
