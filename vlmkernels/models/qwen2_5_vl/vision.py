"""Qwen2.5-VL vision tower (arXiv 2502.13923, section 2.1): windows, RMSNorm, SwiGLU.

Patches are put in window order once, so that a window is a run of tokens: attention in windows is
then the same packed call as attention in frames, with other cu_seqlens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmkernels.models.layers import GatedMlp, run_layer
from vlmkernels.models.qwen2_vl.projector import PatchMerger
from vlmkernels.models.qwen2_vl.vision import (
    Grids,
    PatchEmbed,
    VisionBlock,
    check_grid,
    patch_positions,
)
from vlmkernels.nn import RMSNorm

from .config import Qwen25VLVisionConfig


class Qwen25VLVision(nn.Module):
    """pixel_values (num_patches, patch_dim), grid_thw (num_images, 3) -> (num_tokens, out_dim).

    Arguments, order of rows and errors are those of `Qwen2VLVision`.
    """

    def __init__(self, config: Qwen25VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        sizes = (config.hidden_size, config.intermediate_size, config.hidden_act)
        self.blocks = nn.ModuleList(
            VisionBlock(config, RMSNorm, GatedMlp(*sizes, bias=True)) for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, RMSNorm(config.hidden_size))

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        config, device = self.config, self.patch_embed.proj.weight.device
        grids = check_grid(pixel_values, grid_thw, config)
        merge = config.spatial_merge_size
        order, windows = window_order(grids, merge, config.window_edge)
        rows = (order[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        positions = patch_positions(grids, merge)[:, rows].to(device)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        spans = [_span(lengths, device) for lengths in (windows, frames)]
        x, residual = self.patch_embed(pixel_values)[rows.to(device)], None
        for i, block in enumerate(self.blocks):
            x, residual = run_layer(
                block,
                *(x, residual, positions, *spans[i in config.fullatt_block_indexes]),
                recompute=self.gradient_checkpointing,
            )
        merged: Tensor = self.merger(x, residual)
        return merged[order.argsort().to(device)]


def window_order(grids: Grids, merge: int, edge: int) -> tuple[Tensor, list[int]]:
    """Merged patches sorted by frame and window, and the number of patches in each window.

    order (num_tokens,) int64: the i-th token in window order is token order[i] of the processor's
    order. Windows have `edge` x `edge` merged patches, fewer at the right and lower border.
    """
    orders, lengths, start = [], [], 0
    for t, h, w in grids:
        frame, row, column = (
            axis.flatten()
            for axis in torch.meshgrid(
                *(torch.arange(n) for n in (t, h // merge, w // merge)), indexing="ij"
            )
        )
        across, down = -(-w // merge // edge), -(-h // merge // edge)
        window = (frame * down + row // edge) * across + column // edge
        orders.append(window.argsort(stable=True) + start)
        lengths += [n * merge**2 for n in window.bincount().tolist()]
        start += len(window)
    return torch.cat(orders), lengths


def _span(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens and max_seqlen of runs of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32), max(lengths)
