"""Small pieces that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkernels import ops
from vlmkernels.nn import LayerNorm, RMSNorm


def add_norm(
    norm: RMSNorm | LayerNorm, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = norm(h) in one kernel; returns (y, h). No residual: h = x."""
    x = x.to(norm.weight.dtype)  # under autocast a layer gives halves, the residual stream stays
    if residual is None:
        return norm(x), x
    y, h = norm(x, residual=residual)
    return y, h


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": ops.quick_gelu,
    "gelu": ops.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class Dense(nn.Module):
    """A linear layer under the name that the published files give it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense(x)
        return y


class Mlp(nn.Module):
    """fc2(act(fc1(x)))"""

    def __init__(self, dim: int, mlp_dim: int, act: str) -> None:
        super().__init__()
        self.act = activation(act)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). ValueError for another activation than silu."""

    def __init__(self, dim: int, mlp_dim: int, act: str, *, bias: bool) -> None:
        super().__init__()
        if act != "silu":
            raise ValueError(f"hidden_act: expected one of ['silu'], got {act!r}")
        self.gate_proj = nn.Linear(dim, mlp_dim, bias=bias)
        self.up_proj = nn.Linear(dim, mlp_dim, bias=bias)
        self.down_proj = nn.Linear(mlp_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


def run_layer(layer: nn.Module, *args: Any, recompute: bool) -> tuple[Tensor, Tensor]:
    """Call `layer`; with `recompute` keep only its inputs and run it again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        y, residual = checkpoint(layer, *args, use_reentrant=False)
    else:
        y, residual = layer(*args)
    return y, residual


def expect_floating(name: str, value: Any) -> None:
    """TypeError naming the argument unless it is a tensor of a floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {value.dtype}")
