"""Zero-shot classification with prompts (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .model import Clip, unit
from .processor import ClipProcessor

PROMPT = "a photo of a {}."
# The seven that the original code found best together for ImageNet.
PROMPTS = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ZeroShotClassifier:
    """p(label | image) = softmax_labels(scale * cos(image, label)).

    A label's embedding is the mean of those of its prompts, each of unit length, and of unit
    length again; it is computed once, here.

    Args:
        labels: names of classes.
        templates: prompts with {} in the place of the name.
    """

    def __init__(
        self,
        model: Clip,
        processor: ClipProcessor,
        labels: Sequence[str],
        templates: Sequence[str] = (PROMPT,),
    ) -> None:
        if not labels or not templates:
            raise ValueError("labels: expected at least one label and one template")
        if wrong := [t for t in templates if t.count("{}") != 1]:
            raise ValueError(f"templates: expected {{}} once in each, got {wrong[0]!r}")
        self.model, self.processor, self.labels = model, processor, list(labels)
        self.weight = self._weight(templates)

    @torch.inference_mode()
    def _weight(self, templates: Sequence[str]) -> Tensor:
        """(num_labels, projection_dim)"""
        texts = [t.replace("{}", label) for label in self.labels for t in templates]
        inputs = {k: x.to(self.model.device) for k, x in self.processor(texts).items()}
        embeds = self.model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        return unit(embeds.unflatten(0, (len(self.labels), -1)).mean(dim=1))

    @torch.inference_mode()
    def __call__(self, images: Any) -> Tensor:
        """Probabilities (num_images, num_labels) of one image or many."""
        pixels = self.processor(images=images)["pixel_values"].to(self.model.device)
        scores = self.model.logit_scale.exp() * self.model.encode_image(pixels) @ self.weight.T
        probabilities: Tensor = scores.float().softmax(dim=-1)
        return probabilities
