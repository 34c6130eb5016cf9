"""RMSNorm and LayerNorm with an optional fused residual add."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops


class RMSNorm(torch.nn.Module):
    """y = norm(x) or, given a residual, (norm(h), h) with h = x + residual.

    Drop-in for torch.nn.RMSNorm over one dimension and for transformers' Qwen2RMSNorm, whose
    default eps of 1e-6 it has (that of torch is the smallest step of x's dtype): state_dict key
    `weight`.
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

    Drop-in for torch.nn.LayerNorm over one dimension, with its arguments in its order: state_dict
    keys `weight` and `bias`. elementwise_affine=False: neither (weight is ones, outside of it).
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.elementwise_affine = normalized_shape, eps, elementwise_affine
        ones = torch.ones(normalized_shape, device=device, dtype=dtype)
        self.weight: Tensor
        if elementwise_affine:
            self.weight = torch.nn.Parameter(ones)
        else:
            self.register_buffer("weight", ones, persistent=False)
        has_bias = elementwise_affine and bias
        self.bias = torch.nn.Parameter(torch.zeros_like(ones)) if has_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}"
        )
