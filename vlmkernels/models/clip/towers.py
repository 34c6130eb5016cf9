"""The two towers of CLIP (arXiv 2103.00020, section 2.4) over one kind of layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmkernels.models.encoder import Encoder, Span, TowerConfig, attend, embed_patches
from vlmkernels.models.layers import add_norm
from vlmkernels.models.packing import expect_grid, make_packing
from vlmkernels.nn import LayerNorm, PatchEmbed2d

from .config import ClipTextConfig, ClipVisionConfig


class Attention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads, dim = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )

    def forward(self, x: Tensor, span: Span) -> Tensor:
        out = attend(x, self.q_proj, self.k_proj, self.v_proj, self.num_heads, span)
        y: Tensor = self.out_proj(out)
        return y


class VisionEmbeddings(nn.Module):
    """[class; E patch_1; ...; E patch_N] + positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.grid
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = PatchEmbed2d(
            config.num_channels, config.hidden_size, config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(1 + height * width, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        table = self.position_embedding.weight
        return embed_patches(
            *(self.patch_embedding, pixel_values, self.class_embedding, table),
            *(self.config, interpolate),
        )


class ClipVision(nn.Module):
    """pixel_values (num_images, channels, height, width) -> features (num_images, hidden_size)."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # so published
        self.encoder = Encoder(config, Attention)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
        """The normed [CLS] of every image."""
        x, residual = self._layers(pixel_values, None, interpolate)
        y, _ = add_norm(self.post_layernorm, x[:, 0], None if residual is None else residual[:, 0])
        return y

    def hidden_state(
        self, pixel_values: Tensor, depth: int | None = None, interpolate: bool = False
    ) -> Tensor:
        """(num_images, 1 + num_patches, hidden_size) that leave layer `depth`, without a norm.

        0: what enters the first layer; None: what leaves the last.
        """
        x, residual = self._layers(pixel_values, depth, interpolate)
        return x if residual is None else x + residual

    def _layers(
        self, pixel_values: Tensor, depth: int | None, interpolate: bool
    ) -> tuple[Tensor, Tensor | None]:
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate))
        hidden: tuple[Tensor, Tensor | None] = self.encoder(x, Span(), depth)
        return hidden


class TextEmbeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(input_ids)
        return x + self.position_embedding.weight[: input_ids.shape[1]]


class ClipText(nn.Module):
    """input_ids (num_texts, seqlen) -> normed hidden states and those of the end of text.

    Causal. Padding (0 in attention_mask) is taken out, and its hidden states are zeros.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, Attention)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.embeddings(input_ids)
        expect_grid("attention_mask", attention_mask, x)
        if attention_mask is None:
            h, _ = add_norm(self.final_layer_norm, *self.encoder(x, Span(causal=True)))
        else:
            packing = make_packing(x.shape[0], x.shape[1], x.device, attention_mask)
            span = Span(True, packing.cu_seqlens, packing.max_seqlen)
            x, residual = self.encoder(packing.pack(x), span)
            h = packing.unpack(add_norm(self.final_layer_norm, x, residual)[0])
        return h, h[torch.arange(len(h), device=h.device), self._end(input_ids)]

    def _end(self, input_ids: Tensor) -> Tensor:
        """(num_texts,) the first end-of-text; for eos_token_id 2, as older files have it, the
        first place of the largest id, which end-of-text is in CLIP's own vocabulary."""
        if self.eos_token_id == 2:
            return input_ids.argmax(dim=1)
        return (input_ids == self.eos_token_id).int().argmax(dim=1)
