"""Qwen-VL projector: learned queries read the image by cross-attention (section 2.1)."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from vlmkernels.nn import LayerNorm, Resampler

from .config import QwenVisionConfig


class Projector(nn.Module):
    """ln_post(resampler(x)) proj: (num_images, num_patches, width) -> (num_images, n_queries,
    output_dim), under the published names."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        dim = config.output_dim
        self.attn_pool = Resampler(isqrt(config.n_queries), dim, dim // 128, config.width)
        self.ln_post = LayerNorm(dim, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ln_post(self.attn_pool(x)) @ self.proj
        return y
