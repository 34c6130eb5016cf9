"""RMSNorm and LayerNorm with an optional fused residual add."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops


class RMSNorm(torch.nn.Module):
    """y = norm(x) or, given a residual, (norm(h), h) with h = x + residual.

    Drop-in for torch.nn.RMSNorm over one dimension and for transformers' Qwen2RMSNorm:
    state_dict key `weight`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = torch.nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(torch.nn.Module):
    """y = norm(x) or, given a residual, (norm(h), h) with h = x + residual.

    Drop-in for torch.nn.LayerNorm over one dimension: state_dict keys `weight` and `bias`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = torch.nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        zeros = torch.zeros(dim, device=device, dtype=dtype) if bias else None
        self.bias = torch.nn.Parameter(zeros) if zeros is not None else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}"
