"""Qwen2-VL vision tower (arXiv 2409.12191, section 2.1): patches of any number of images at once.

Images are never padded: all patches of a batch form one run of tokens, `cu_seqlens` marks the
frames, and attention stays inside a frame.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vlmkernels.models.layers import Mlp, add_norm, expect_floating, run_layer
from vlmkernels.nn import LayerNorm, PatchEmbed3d, RMSNorm
from vlmkernels.ops import attention, vision_rope

from .config import Qwen2VLVisionConfig, VisionFields
from .projector import PatchMerger

Grids = list[tuple[int, int, int]]
Norm = type[LayerNorm] | type[RMSNorm]


class PatchEmbed(nn.Module):
    """Patch rows (num_patches, channels * frames * patch * patch) -> (num_patches, embed_dim)."""

    def __init__(self, config: VisionFields) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = PatchEmbed3d(config.in_channels, config.embed_dim, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x.to(self.proj.weight.dtype))
        return tokens


class VisionAttention(nn.Module):
    """Full attention inside each frame; 2-D RoPE on queries and keys."""

    def __init__(self, config: VisionFields) -> None:
        super().__init__()
        self.num_heads, self.theta = config.num_heads, config.rope_theta
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = vision_rope(q, k, positions, theta=self.theta)
        out = cast(Tensor, attention(q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen))
        y: Tensor = self.proj(out.flatten(1))
        return y


class VisionBlock(nn.Module):
    """Pre-norm block. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: VisionFields, norm: Norm, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = (norm(config.embed_dim, eps=1e-6) for _ in range(2))
        self.attn = VisionAttention(config)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> tuple[Tensor, Tensor]:
        y, residual = add_norm(self.norm1, x, residual)
        y = self.attn(y, positions, cu_seqlens, max_seqlen)
        y, residual = add_norm(self.norm2, y, residual)
        return self.mlp(y), residual


class Qwen2VLVision(nn.Module):
    """pixel_values (num_patches, patch_dim), grid_thw (num_images, 3) -> (num_tokens, hidden_size).

    `grid_thw` counts patches along time, height and width of each image or video; num_tokens is
    num_patches / spatial_merge_size^2. Rows come in the processor's order. Raises ValueError when
    the grid does not describe the rows.
    """

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        dim, act = config.embed_dim, config.hidden_act
        self.blocks = nn.ModuleList(
            VisionBlock(config, LayerNorm, Mlp(dim, int(dim * config.mlp_ratio), act))
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, LayerNorm(config.embed_dim, eps=1e-6))

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        grids = check_grid(pixel_values, grid_thw, self.config)
        device = self.patch_embed.proj.weight.device
        positions = patch_positions(grids, self.config.spatial_merge_size).to(device)
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        x, residual = self.patch_embed(pixel_values), None
        for block in self.blocks:
            x, residual = run_layer(
                block,
                *(x, residual, positions, cu_seqlens, max(lengths)),
                recompute=self.gradient_checkpointing,
            )
        merged: Tensor = self.merger(x, residual)
        return merged


def patch_positions(grids: Grids, merge: int) -> Tensor:
    """(2, num_patches) int64: row and column of every patch, 2 x 2 blocks first, frame by frame."""
    positions = []
    for t, h, w in grids:
        rows_and_columns = torch.stack(
            torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        )
        blocks = rows_and_columns.view(2, h // merge, merge, w // merge, merge).transpose(2, 3)
        positions.append(blocks.reshape(2, -1).repeat(1, t))
    return torch.cat(positions, dim=1)


def check_grid(pixel_values: Tensor, grid_thw: Tensor, config: VisionFields) -> Grids:
    """The rows of `grid_thw` as Python numbers, checked against `pixel_values`."""
    expect_floating("pixel_values", pixel_values)
    if not isinstance(grid_thw, Tensor) or grid_thw.is_floating_point():
        got = getattr(grid_thw, "dtype", type(grid_thw).__name__)
        raise TypeError(f"grid_thw: expected a torch.Tensor of integers, got {got}")
    if pixel_values.ndim != 2 or pixel_values.shape[1] != config.patch_dim:
        raise ValueError(
            f"pixel_values: expected shape (num_patches, {config.patch_dim}), "
            f"got {tuple(pixel_values.shape)}"
        )
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or len(grid_thw) == 0:
        raise ValueError(f"grid_thw: expected shape (num_images, 3), got {tuple(grid_thw.shape)}")
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    merge = config.spatial_merge_size
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"grid_thw: expected positive (t, h, w), h and w multiples of {merge}, got {grid}"
            )
    num_patches = sum(t * h * w for t, h, w in grids)
    if num_patches != len(pixel_values):
        raise ValueError(
            f"pixel_values: expected {num_patches} rows (the patches of grid_thw), "
            f"got {len(pixel_values)}"
        )
    return grids
