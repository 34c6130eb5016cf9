"""Pre-norm transformer encoder pieces that ViT and both towers of CLIP share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vlmkernels.models.layers import add_norm
from vlmkernels.nn import LayerNorm
from vlmkernels.ops import attention


@dataclass(frozen=True)
class Span:
    """Which tokens see which: all of a row, or those of a packed sequence; causal or not."""

    causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def attend(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, num_heads: int, span: Span
) -> Tensor:
    """Self-attention of x (..., seqlen, hidden_size) before its output projection."""
    heads = (proj(x).unflatten(-1, (num_heads, -1)) for proj in (q, k, v))
    out = attention(
        *heads, causal=span.causal, cu_seqlens_q=span.cu_seqlens, max_seqlen_q=span.max_seqlen
    )
    return cast(Tensor, out).flatten(-2)


def pre_norm_block(
    x: Tensor,
    residual: Tensor | None,
    norms: tuple[LayerNorm, LayerNorm],
    attention: Callable[[Tensor, Span], Tensor],
    mlp: Callable[[Tensor], Tensor],
    span: Span,
) -> tuple[Tensor, Tensor]:
    """h = x + residual; h = h + attention(norm1(h)); returns (mlp(norm2(h)), h).

    The last sum is left to the next norm, which makes it in its kernel.
    """
    y, h = add_norm(norms[0], x, residual)
    y, h = add_norm(norms[1], attention(y, span), h)
    return mlp(y), h


def expect_pixels(
    pixel_values: Tensor, channels: int, size: tuple[int, int], interpolate: bool
) -> None:
    """ValueError or TypeError unless these are (num_images, channels, height, width) images."""
    if not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values: expected floating point, got {pixel_values.dtype}")
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"pixel_values: expected shape (num_images, {channels}, height, width), got {shape}"
        )
    if shape[2:] != size and not interpolate:
        raise ValueError(
            f"pixel_values: expected images of {size[0]} x {size[1]}, got {shape[2]} x {shape[3]}; "
            "interpolate_pos_encoding=True takes any size"
        )


def positions_for(table: Tensor, source: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position table (source_h * source_w, dim) for another grid of patches, bicubic in between."""
    if grid == source:
        return table
    image = table.view(1, *source, -1).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.contiguous()


def prepend(token: Tensor, patches: Tensor) -> Tensor:
    """[CLS] (dim,) in front of every row of (num_images, num_patches, dim)."""
    return torch.cat([token.expand(len(patches), 1, -1), patches], dim=1)
