"""LLaVA-1.5 projector: a two-layer MLP from the width of the tower to that of the words."""

from __future__ import annotations

from torch import Tensor, nn

from vlmkernels.models.layers import activation

from .config import LlavaConfig


class Projector(nn.Module):
    """y = W2 gelu(W1 x), (..., vision hidden_size) -> (..., text hidden_size)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.act = activation(config.projector_hidden_act)
        dim, bias = config.text.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision.hidden_size, dim, bias=bias)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return y
