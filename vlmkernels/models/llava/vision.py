"""LLaVA-1.5 vision: patch features of CLIP, from the layer before the last."""

from __future__ import annotations

from torch import Tensor, nn

from vlmkernels.models.clip import ClipVision

from .config import LlavaConfig


class LlavaVision(nn.Module):
    """pixel_values (num_images, 3, height, width) -> (num_images, num_features, hidden_size).

    Layers behind the one whose output is taken have weights, as published, and do not run.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.depth = config.feature_depth
        self.with_cls = config.vision_feature_select_strategy == "full"
        self.vision_model = ClipVision(config.vision)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h: Tensor = self.vision_model.hidden_state(pixel_values, self.depth)
        return h if self.with_cls else h[:, 1:]
