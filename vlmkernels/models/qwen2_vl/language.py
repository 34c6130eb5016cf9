"""Qwen2-VL language model: Qwen2 with M-RoPE (arXiv 2409.12191, section 2.1)."""

from __future__ import annotations

from vlmkernels.models.decoder import Decoder
from vlmkernels.nn import MRotaryEmbedding

from .config import Qwen2VLConfig


class Qwen2VLLanguage(Decoder):
    """`Decoder` with biases on q, k, v; position_ids (3, num_tokens): time, height, width."""

    num_axes = 3

    def __init__(self, config: Qwen2VLConfig) -> None:
        rotary = MRotaryEmbedding(config.mrope_section, theta=config.rope_theta)
        super().__init__(config, rotary, bias=True)
