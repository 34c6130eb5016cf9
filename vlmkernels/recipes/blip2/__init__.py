"""BLIP-2's two stages (arXiv 2301.12597, sections 3.2, 3.3 and 4; LAVIS): what the queries read out
of a frozen tower is matched with captions, then a frozen language model writes captions from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmkernels.models.blip2 import Blip2OPT, Blip2Pretraining, Blip2Processor, Blip2T5
from vlmkernels.recipes import ranks
from vlmkernels.recipes.stages import Conversation, Stage, StageSettings, answer_of, only_picture
from vlmkernels.recipes.trainer import Batch, NextToken


class Pairs:
    """Contrast, matching and captioning; the wrong pairs are made on each rank from its own."""

    splits = False

    def count(self, batch: Batch) -> int:
        return len(batch["pixel_values"])

    def loss(self, model: Any, batch: Batch, num_items: int) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss / ranks.world_size()

    def after_step(self, model: Any) -> None: ...


class Answer(NextToken):
    """Of a decoder of its own, whose labels are not shifted."""

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())


def pair_batch(
    processor: Blip2Processor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """[CLS] caption [SEP], and the images."""
    texts = [answer_of(messages) for messages in conversations]
    pictures = [only_picture(messages) for messages in conversations]
    return processor(texts, pictures, max_length=settings.max_length, padding_side="right")


def caption_batch(
    processor: Blip2Processor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """[queries] </s> caption \\n: everything behind the queries carries loss."""
    texts = [answer_of(messages) + "\n" for messages in conversations]
    pictures = [only_picture(messages) for messages in conversations]
    batch = processor(texts, pictures, max_length=settings.max_length, padding_side="right")
    ids = batch["input_ids"]
    silent = (batch["attention_mask"] == 0) | (ids == processor.image_token_id)
    return {**batch, "labels": ids.masked_fill(silent, -100)}


def continuation_batch(
    processor: Blip2Processor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """The encoder reads [queries] and the first words of a caption, the decoder learns the others;
    where it is cut is drawn from the caption itself and the seed."""
    halves = [_halves(answer_of(messages), settings.seed) for messages in conversations]
    pictures = [only_picture(messages) for messages in conversations]
    how: dict[str, Any] = {"max_length": settings.max_length, "padding_side": "right"}
    batch = processor([first for first, _ in halves], pictures, **how)
    tokenizer, longest = processor.tokenizer, settings.max_length
    rows = [tokenizer.encode(rest, add_special_tokens=True) for _, rest in halves]
    answers = tokenizer.pad([row[:longest] for row in rows], "right")
    labels: Tensor = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def _halves(caption: str, seed: int) -> tuple[str, str]:
    """The second has a word at least."""
    words = caption.split()
    place = random.Random(f"{seed} {caption}").randrange(max(1, len(words)))
    return " ".join(words[:place]), " ".join(words[place:])


_ALL: dict[str, Any] = {
    "lr": 1e-4,
    "warmup": 2000,
    "weight_decay": 0.05,
    "beta2": 0.98,
    "max_length": 32,
}
_SECOND: dict[str, Any] = {
    "frozen": r"vision_model\.|language_model\.",
    "steps": 80_000,
    "min_lr": 0.5,
}
STAGES = {
    "1": Stage(
        "queries and Q-Former learn which captions belong to an image, and to write them",
        Blip2Pretraining,
        published=_ALL | {"frozen": r"vision_model\.", "steps": 250_000, "batch": 1680},
        collate=pair_batch,
        captions=True,
        objective=Pairs(),
    ),
    "2-opt": Stage(
        "queries, Q-Former and projection learn to caption through OPT",
        Blip2OPT,
        published=_ALL | _SECOND | {"batch": 1920},
        collate=caption_batch,
        captions=True,
    ),
    "2-t5": Stage(
        "queries, Q-Former and projection learn to go on with a caption through FlanT5",
        Blip2T5,
        published=_ALL | _SECOND | {"batch": 1520},
        collate=continuation_batch,
        captions=True,
        objective=Answer(),
    ),
}
