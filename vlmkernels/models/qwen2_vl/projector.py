"""Qwen2-VL merger: every 2 x 2 block of patches becomes one row of the language model."""

from __future__ import annotations

from torch import Tensor, nn

from vlmkernels.models.layers import add_norm
from vlmkernels.nn import LayerNorm, RMSNorm

from .config import VisionFields


class PatchMerger(nn.Module):
    """y = W2 gelu(W1 concat_4(norm(x))), 4 = spatial_merge_size^2 consecutive patches.

    (num_patches, embed_dim) -> (num_patches / 4, out_dim). The processor orders patches block
    by block, so the four of a block are neighbours in memory and merging is a view.
    """

    def __init__(self, config: VisionFields, norm: LayerNorm | RMSNorm) -> None:
        super().__init__()
        self.merged_dim = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = norm
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_dim, self.merged_dim),
            nn.GELU(),
            nn.Linear(self.merged_dim, config.out_dim),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y, _ = add_norm(self.ln_q, x, residual)
        merged: Tensor = self.mlp(y.view(-1, self.merged_dim))
        return merged
