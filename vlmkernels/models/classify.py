"""Names for images: of the labels given (CLIP) or of the classes a model was trained on (ViT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.models.clip import Clip, ZeroShotClassifier
from vlmkernels.models.clip.zero_shot import PROMPT
from vlmkernels.models.vit import ViT

Ranking = list[tuple[str, float]]


def classify(
    model: Any,
    processor: Any,
    images: Any,
    labels: Sequence[str] = (),
    templates: Sequence[str] = (),
) -> list[Ranking]:
    """(name, probability) of every class, the likeliest first, for each image.

    Raises ValueError when the model classifies nothing, or labels are missing or not wanted.
    """
    if isinstance(model, Clip):
        classifier = ZeroShotClassifier(model, processor, labels, templates or (PROMPT,))
        return _rank(classifier(images), classifier.labels)
    if not isinstance(model, ViT) or not model.config.num_labels:
        raise ValueError(f"model: expected a CLIP or a ViT with a head, got {type(model).__name__}")
    if labels or templates:
        raise ValueError("labels: expected none for a ViT, which has its own")
    with torch.inference_mode():
        logits = model(processor(images)["pixel_values"].to(model.device)).logits
    names = [model.config.label(i) for i in range(model.config.num_labels)]
    return _rank(logits.float().softmax(dim=-1), names)


def _rank(probabilities: Tensor, names: Sequence[str]) -> list[Ranking]:
    rankings = []
    for row in probabilities:
        values, order = row.sort(descending=True)
        rankings.append(
            [(names[i], p) for i, p in zip(order.tolist(), values.tolist(), strict=True)]
        )
    return rankings
