"""TEMPORARY stand-ins of the norm modules, until the real ones land."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops


class RMSNorm(torch.nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)


class LayerNorm(torch.nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(dim)), eps
        self.bias = torch.nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)
