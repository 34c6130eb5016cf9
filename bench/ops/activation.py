"""Activations against torch's and transformers' eager code, at the widths of real MLPs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, both_directions, dtype_name
from vlmkernels.testing.shapes import shape


def eager_quick_gelu(x: Tensor) -> Tensor:
    """transformers' QuickGELUActivation."""
    return x * torch.sigmoid(1.702 * x)


def eager_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def eager_gelu_tanh(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_swiglu_fused(gate: Tensor) -> Tensor:
    return eager_swiglu(*gate.chunk(2, dim=-1))


def eager_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


# op, function, eager, operations per element (exp and division as one each), shape, rows on a CPU
CASES: tuple[tuple[str, str, Callable[..., Tensor], int, str, int], ...] = (
    ("quick_gelu", "quick_gelu", eager_quick_gelu, 5, "qwen2vl_vision", 256),
    ("quick_gelu", "quick_gelu", eager_quick_gelu, 5, "vit_l_14_336", 577),
    ("gelu", "gelu", eager_gelu, 22, "vit_b_16_224", 197),
    ("gelu", "gelu", eager_gelu, 22, "vit_g_14_224", 257),
    ("gelu tanh", "gelu", eager_gelu_tanh, 9, "siglip_so400m_14_384", 729),
    ("swiglu", "swiglu", eager_swiglu, 5, "qwen25vl_vision", 256),
    ("swiglu", "swiglu", eager_swiglu, 5, "qwen2vl_7b", 64),
    ("swiglu fused", "swiglu", eager_swiglu_fused, 5, "qwen2vl_2b", 128),
    ("geglu", "geglu", eager_geglu, 10, "qwen2vl_2b", 128),
)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for op, function, eager, operations, name, rows in CASES:
        s = shape(name)
        rows = rows * 32 if device.startswith("cuda") else rows
        width = 2 * s.mlp_dim if op.endswith("fused") else s.mlp_dim
        gated = function in ("swiglu", "geglu")
        inputs: dict[str, Any] = {
            part: torch.randn(rows, width, device=device).to(dtype).requires_grad_()
            for part in (("gate",) if op.endswith("fused") else ("gate", "up") if gated else "x")
        }
        if op == "gelu tanh":
            inputs["approximate"] = "tanh"
        one_pass = rows * s.mlp_dim * dtype.itemsize
        tensors = 2 if gated else 1
        yield from both_directions(
            function,
            inputs,
            eager,
            op=op,
            shape=f"{s.name} {rows}x{s.mlp_dim}",
            dtype=dtype_name(next(iter(inputs.values()))),
            # Backward reads dy and the inputs and writes a gradient of each.
            bytes=((tensors + 1) * one_pass, (2 * tensors + 1) * one_pass),
            flops=(operations * rows * s.mlp_dim, 2 * operations * rows * s.mlp_dim),
        )
