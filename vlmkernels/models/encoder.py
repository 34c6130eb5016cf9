"""Pre-norm transformer encoder pieces that ViT, both towers of CLIP and BLIP-2's share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vlmkernels.models.layers import Mlp, add_norm, expect_floating, run_layer
from vlmkernels.nn import LayerNorm, PatchEmbed2d
from vlmkernels.ops import attention


@dataclass(frozen=True)
class Span:
    """Which tokens see which: all of a row, or those of a packed sequence; causal or not.

    image_ids (num_tokens,) int32: tokens of equal id >= 0 see each other although it is causal.
    """

    causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    image_ids: Tensor | None = None


class TowerConfig(Protocol):
    """What an encoder wants to know; the configs of the models have it under these names."""

    hidden_act: str
    hidden_size: int
    intermediate_size: int
    layer_norm_eps: float
    num_attention_heads: int
    num_hidden_layers: int


class PatchConfig(Protocol):
    """What the embeddings of images want to know."""

    image_size: int
    num_channels: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]: ...


def attend(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, num_heads: int, span: Span
) -> Tensor:
    """Self-attention of x (..., seqlen, hidden_size) before its output projection."""
    heads = (proj(x).unflatten(-1, (num_heads, -1)) for proj in (q, k, v))
    out = attention(
        *heads, causal=span.causal, cu_seqlens_q=span.cu_seqlens, max_seqlen_q=span.max_seqlen,
        image_ids=span.image_ids,
    )  # fmt: skip
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


class Layer(nn.Module):
    """Pre-norm block. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: TowerConfig, attention: Callable[[TowerConfig], nn.Module]) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = attention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, residual: Tensor | None, span: Span) -> tuple[Tensor, Tensor]:
        norms = (self.layer_norm1, self.layer_norm2)
        return pre_norm_block(x, residual, norms, self.self_attn, self.mlp, span)


class Encoder(nn.Module):
    """Layers under CLIP's names, each with an `attention` (x, span) -> y of the model's.

    Returns (x, residual) after the first `depth` of them; their sum is the hidden state.
    """

    def __init__(self, config: TowerConfig, attention: Callable[[TowerConfig], nn.Module]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            Layer(config, attention) for _ in range(config.num_hidden_layers)
        )

    def forward(
        self, x: Tensor, span: Span, depth: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        residual = None
        for layer in self.layers[:depth]:
            x, residual = run_layer(layer, x, residual, span, recompute=self.gradient_checkpointing)
        return x, residual


def expect_pixels(
    pixel_values: Tensor, channels: int, size: tuple[int, int], interpolate: bool
) -> None:
    """ValueError or TypeError unless these are (num_images, channels, height, width) images."""
    expect_floating("pixel_values", pixel_values)
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


def embed_patches(
    projection: PatchEmbed2d,
    pixel_values: Tensor,
    cls: Tensor,
    table: Tensor,
    config: PatchConfig,
    interpolate: bool,
) -> Tensor:
    """[cls; E patch_1; ...; E patch_N] + table, (num_images, 1 + num_patches, dim).

    cls (dim,); table (1 + num_patches, dim), its patches resized to the image with `interpolate`.
    """
    size, patch = (config.image_size, config.image_size), config.patch_size
    expect_pixels(pixel_values, config.num_channels, size, interpolate)
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    positions = positions_for(table[1:], config.grid, grid)
    patches = projection(pixel_values.to(projection.weight.dtype), positions)
    return torch.cat([(cls + table[0]).expand(len(patches), 1, -1), patches], dim=1)
