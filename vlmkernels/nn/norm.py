"""RMSNorm and LayerNorm with an optional fused residual add."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import typed


def _ones(
    module: torch.nn.Module,
    name: str,
    dim: Any,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """(dim,); drop-ins are also handed a shape of one dimension."""
    width = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    where = f"{type(module).__name__}: {name}"
    if not isinstance(width, Integral) or isinstance(width, bool):
        raise TypeError(f"{where} must be an int (one dimension is normalised), got {dim!r}")
    if width < 1:
        raise ValueError(f"{where} must be positive, got {dim!r}")
    return torch.ones(int(width), device=device, dtype=dtype)


class RMSNorm(torch.nn.Module):
    """y = norm(x) or, given a residual, (norm(h), h) with h = x + residual.

    Drop-in for torch.nn.RMSNorm over one dimension and for transformers' Qwen2RMSNorm, whose
    default eps of 1e-6 it has (that of torch is the smallest step of x's dtype): state_dict key
    `weight`.
    """

    @typed
    def __init__(
        self,
        dim: int | Sequence[int],
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = torch.nn.Parameter(_ones(self, "dim", dim, device, dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(torch.nn.Module):
    """y = norm(x) or, given a residual, (norm(h), h) with h = x + residual.

    Drop-in for torch.nn.LayerNorm over one dimension, with its arguments in its order: state_dict
    keys `weight` and `bias`. elementwise_affine=False: neither (weight is ones, outside of it).
    """

    @typed
    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.elementwise_affine = normalized_shape, eps, elementwise_affine
        ones = _ones(self, "normalized_shape", normalized_shape, device, dtype)
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
