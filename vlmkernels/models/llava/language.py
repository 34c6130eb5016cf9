"""LLaVA-1.5 language model: LLaMA-2 (Vicuna)."""

from __future__ import annotations

from torch import nn

from vlmkernels.models.decoder import Decoder
from vlmkernels.nn import RotaryEmbedding

from .config import LlavaConfig


class LlavaLanguage(nn.Module):
    """The decoder and its head, nested as the published names are."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        text = config.text
        self.model = Decoder(text, RotaryEmbedding(theta=text.rope_theta), bias=False)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
