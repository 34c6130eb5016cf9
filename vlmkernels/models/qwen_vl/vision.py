"""Qwen-VL vision: ViT-bigG of OpenCLIP without [CLS], under the published names."""

from __future__ import annotations

from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn

from vlmkernels import ops
from vlmkernels.models.encoder import Span, expect_pixels, positions_for, pre_norm_block
from vlmkernels.models.layers import run_layer
from vlmkernels.nn import LayerNorm, PatchEmbed2d

from .config import QwenVisionConfig
from .projector import Projector

EPS = 1e-6
# The stored table is that of 224 pixels; it is interpolated to the grid of the image.
NUM_POSITIONS = 256


class VisualAttention(nn.Module):
    """Self-attention; rows of in_proj are ordered by head, then q, k, v, then element."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        out = cast(Tensor, ops.attention(q, k, v, causal=span.causal))
        y: Tensor = self.out_proj(out.flatten(-2))
        return y


class VisualMlp(nn.Module):
    """c_proj(gelu(c_fc(x)))"""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_dim)
        self.c_proj = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(ops.gelu(self.c_fc(x)))
        return y


class VisualBlock(nn.Module):
    """Pre-norm block. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=EPS)
        self.ln_2 = LayerNorm(config.width, eps=EPS)
        self.attn = VisualAttention(config)
        self.mlp = VisualMlp(config)

    def forward(self, x: Tensor, residual: Tensor | None, span: Span) -> tuple[Tensor, Tensor]:
        return pre_norm_block(x, residual, (self.ln_1, self.ln_2), self.attn, self.mlp, span)


class VisualTransformer(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.resblocks = nn.ModuleList(VisualBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for block in self.resblocks:
            recompute = self.gradient_checkpointing
            x, residual = run_layer(block, x, residual, Span(), recompute=recompute)
        return x if residual is None else x + residual


class QwenVision(Projector):
    """pixel_values (num_images, 3, size, size) -> (num_images, n_queries, output_dim).

    The tower, then what it inherits: resampler, norm and projection. Any size that is a multiple of
    patch_size will do, and always gives n_queries tokens; the published models saw image_size.
    """

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__(config)
        self.config = config
        self.conv1 = PatchEmbed2d(3, config.width, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(NUM_POSITIONS, config.width))
        self.ln_pre = LayerNorm(config.width, eps=EPS)
        self.transformer = VisualTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        size, patch = self.config.image_size, self.config.patch_size
        expect_pixels(pixel_values, 3, (size, size), interpolate=True)
        height, width = pixel_values.shape[2:]
        if height != width or height % patch or not height:
            raise ValueError(
                f"pixel_values: expected square images, a multiple of {patch} a side, "
                f"got {height} x {width}"
            )
        table, side = self.positional_embedding, isqrt(NUM_POSITIONS)
        grid = (height // patch, width // patch)
        positions = positions_for(table.float(), (side, side), grid).to(table.dtype)
        x = self.conv1(pixel_values.to(self.conv1.weight.dtype), positions)
        return super().forward(self.transformer(self.ln_pre(x)))
