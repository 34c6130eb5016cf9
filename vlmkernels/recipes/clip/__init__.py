"""CLIP's training (arXiv 2103.00020, section 2.5): the settings of ViT-B/32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.distributed.contrastive_loss import clip_loss
from vlmkernels.models.clip import Clip, ClipProcessor
from vlmkernels.recipes import ranks
from vlmkernels.recipes.stages import (
    Conversation,
    Stage,
    StageSettings,
    answer_of,
    only_picture,
)
from vlmkernels.recipes.trainer import Batch

MAX_SCALE = 100.0


class Contrastive:
    """Each image against the texts of the whole batch, on whatever rank, and each text against its
    images. After a step exp(logit_scale) is at most MAX_SCALE."""

    splits = False  # a smaller batch has fewer negatives: it is another loss

    def count(self, batch: Batch) -> int:
        return len(batch["pixel_values"])

    def loss(self, model: Any, batch: Batch, num_items: int) -> Tensor:
        out = model(**batch)
        loss = clip_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp())
        return loss / ranks.world_size()  # a mean over this rank's pairs

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        model.logit_scale.clamp_(0.0, math.log(MAX_SCALE))


def pair_batch(
    processor: ClipProcessor, conversations: Sequence[Conversation], settings: StageSettings
) -> Batch:
    """Images and what is said of them; texts are cut to what the model has positions for."""
    texts = [answer_of(messages) for messages in conversations]
    return processor(texts, [only_picture(messages) for messages in conversations])


STAGES = {
    "1": Stage(
        "both towers learn from pairs",
        Clip,
        published={
            "epochs": 32,
            "batch": 32768,
            "lr": 5e-4,
            "warmup": 2000,
            "weight_decay": 0.2,
            "beta2": 0.98,
            "eps": 1e-6,
        },
        collate=pair_batch,
        captions=True,
        objective=Contrastive(),
    ),
}
