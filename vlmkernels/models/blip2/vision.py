"""BLIP-2 vision: EVA-CLIP ViT-g/14 without its last block (arXiv 2301.12597, section 3.3).

The nesting of modules is that of the published parameter names.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vlmkernels.models.encoder import Encoder, Span, TowerConfig, embed_patches
from vlmkernels.models.layers import add_norm
from vlmkernels.nn import LayerNorm, PatchEmbed2d
from vlmkernels.ops import attention

from .config import Blip2VisionConfig


class Attention(nn.Module):
    """Self-attention whose queries, keys and values come from one product."""

    def __init__(self, config: TowerConfig, bias: bool) -> None:
        super().__init__()
        self.num_heads, dim = config.num_attention_heads, config.hidden_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = cast(Tensor, attention(q, k, v, causal=span.causal))
        y: Tensor = self.projection(out.flatten(-2))
        return y


class Embeddings(nn.Module):
    """[class; E patch_1; ...; E patch_N] + positions."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.config = config
        dim, num_patches = config.hidden_size, config.grid[0] * config.grid[1]
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + num_patches, dim))
        self.patch_embedding = PatchEmbed2d(config.num_channels, dim, config.patch_size)

    def forward(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        cls, table = self.class_embedding[0, 0], self.position_embedding[0]
        projection = self.patch_embedding
        return embed_patches(projection, pixel_values, cls, table, self.config, interpolate)


class Blip2Vision(nn.Module):
    """pixel_values (num_images, channels, height, width) -> (num_images, 1 + num_patches, hidden).

    The first row of an image is [class]. Sizes other than image_size take `interpolate`.
    """

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, lambda tower: Attention(tower, config.qkv_bias))
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        y, _ = add_norm(
            self.post_layernorm, *self.encoder(self.embeddings(pixel_values, interpolate), Span())
        )
        return y
