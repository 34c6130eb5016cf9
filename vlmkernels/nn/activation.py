"""Activations as modules without parameters, and the SwiGLU MLP of Qwen and Llama."""

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.nn._arguments import expect_positive, expect_tensors, typed
from vlmkernels.ops.activation import kind_of


class QuickGELU(torch.nn.Module):
    """`ops.quick_gelu`: drop-in for transformers' QuickGELUActivation and open_clip's QuickGELU."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.quick_gelu(x)


class GELU(torch.nn.Module):
    """`ops.gelu`: drop-in for torch.nn.GELU."""

    @typed
    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        kind_of("GELU", approximate)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class GELUTanh(GELU):
    """`GELU("tanh")`, under the name that transformers and timm have for it."""

    def __init__(self) -> None:
        super().__init__("tanh")


class SwiGLU(torch.nn.Module):
    """`ops.swiglu` of two tensors, or of one fused projection: gate first, as in timm and vLLM."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)


class GEGLU(torch.nn.Module):
    """`ops.geglu` of two tensors, or of one fused projection: gate first."""

    @typed
    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        kind_of("GEGLU", approximate)
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SwiGLUMLP(torch.nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)).

    Drop-in for transformers' Qwen2MLP, Qwen3VLTextMLP and LlamaMLP: state_dict keys
    `gate_proj.weight`, `up_proj.weight`, `down_proj.weight` (and `.bias`).
    """

    @typed
    def __init__(
        self,
        hidden_dim: int,
        mlp_dim: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_positive(self, hidden_dim=hidden_dim, mlp_dim=mlp_dim)
        self.gate_proj, self.up_proj = (
            torch.nn.Linear(hidden_dim, mlp_dim, bias, device, dtype) for _ in range(2)
        )
        self.down_proj = torch.nn.Linear(mlp_dim, hidden_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        expect_tensors(self, x=x)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]
