"""ViT: encoder, classification head, loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmkernels.models.output import Output
from vlmkernels.models.pretrained import Pretrained

from .config import ViTConfig
from .vision import ViTVision
from .weights import own_name, published_name


@dataclass
class ViTOutput(Output):
    """What a ViT makes of images."""

    logits: Tensor | None  # (num_images, num_labels); None without a head
    last_hidden_state: Tensor  # (num_images, 1 + num_patches, hidden_size), normed
    pooled: Tensor  # (num_images, hidden_size): [CLS], through the tanh layer where there is one
    loss: Tensor | None = None


class ViT(Pretrained):
    """ViT (arXiv 2010.11929) with the published parameter names and transformers' keywords."""

    config_class = ViTConfig
    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = ViTVision(config)
        if config.num_labels:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ViTOutput:
        """Logits of every image and, with labels, the loss.

        Args:
            pixel_values: (num_images, channels, height, width).
            labels: (num_images,) int64 classes: cross entropy; floating point (num_images,
                num_labels): binary cross entropy of every label.
            interpolate_pos_encoding: take images of another size than config.image_size.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        h = self.vit(pixel_values, interpolate_pos_encoding)
        cls = h[:, 0]
        pooled = torch.tanh(self.vit.pooler(cls)) if self.config.pooler else cls
        logits = self.classifier(cls) if self.config.num_labels else None
        loss = None
        if labels is not None:
            loss = _loss(logits, labels)
        return ViTOutput(logits, h, pooled, loss)

    def own_name(self, stored: str) -> str:
        return own_name(stored)

    def published_state(self) -> Mapping[str, Tensor]:
        state = self.state_dict()
        return {published_name(k, self.config.pooler): v for k, v in state.items()}


def _loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    if logits is None:
        raise ValueError("labels: expected None, the model has no classification head")
    expected = logits.shape if labels.is_floating_point() else logits.shape[:1]
    if labels.shape != expected:
        raise ValueError(f"labels: expected shape {tuple(expected)}, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return nn.functional.cross_entropy(logits.float(), labels)
