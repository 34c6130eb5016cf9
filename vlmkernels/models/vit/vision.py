"""ViT encoder (arXiv 2010.11929, section 3.1): [CLS] and patches through pre-norm blocks.

The nesting of modules is that of the published parameter names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmkernels.models.encoder import Span, attend, embed_patches, pre_norm_block
from vlmkernels.models.layers import Dense, activation, add_norm, run_layer
from vlmkernels.nn import LayerNorm, PatchEmbed2d

from .config import ViTConfig


class PatchEmbeddings(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.projection = PatchEmbed2d(config.num_channels, config.hidden_size, config.patch_size)


class Embeddings(nn.Module):
    """z0 = [cls; E patch_1; ...; E patch_N] + positions (equation 1 of the paper)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, 1 + height * width, config.hidden_size)
        )
        self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        table, cls = self.position_embeddings[0], self.cls_token[0, 0]
        projection = self.patch_embeddings.projection
        return embed_patches(projection, pixel_values, cls, table, self.config, interpolate)


class SelfAttention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.qkv_bias
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return attend(x, self.query, self.key, self.value, self.num_heads, span)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.output = Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        y: Tensor = self.output(self.attention(x, span))
        return y


class Layer(nn.Module):
    """Pre-norm block. Takes and returns (x, residual): the next norm adds them in its kernel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.act = activation(config.hidden_act)
        self.attention = Attention(config)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size)
        self.output = Dense(config.intermediate_size, config.hidden_size)
        self.layernorm_before = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        norms = (self.layernorm_before, self.layernorm_after)
        return pre_norm_block(x, residual, norms, self.attention, self._mlp, Span())

    def _mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.act(self.intermediate(x)))
        return y


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class ViTVision(nn.Module):
    """pixel_values (num_images, channels, height, width) -> (num_images, 1 + num_patches, hidden).

    The first row of an image is [CLS]. Sizes other than image_size take `interpolate`: the table
    of positions is then resized bicubically (section 3.2).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.pooler:
            self.pooler = Dense(config.hidden_size, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        x, residual = self.embeddings(pixel_values, interpolate), None
        for layer in self.encoder.layer:
            x, residual = run_layer(layer, x, residual, recompute=self.gradient_checkpointing)
        y, _ = add_norm(self.layernorm, x, residual)
        return y
