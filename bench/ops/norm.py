"""norm against transformers' Qwen2RMSNorm and torch's layer_norm, with and without a residual."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, both_directions, dtype_name
from vlmkernels.testing.shapes import Shape, shape


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' Qwen2RMSNorm.forward."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def after_add(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, residual: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, **parameters), h

    return run


EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": eager_rms_norm,
    "layer_norm": eager_layer_norm,
}
# name, rows on a CPU
SHAPES = (
    *(("qwen2vl_7b", 256), ("qwen2vl_2b", 512), ("qwen2vl_vision", 1024)),
    *(("siglip_so400m_14_384", 729), ("vit_b_16_224", 197)),
)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, rows in SHAPES:
        s = shape(name)
        rows = rows * 32 if device.startswith("cuda") else rows
        for residual in (False, True):
            yield from cases_of(s, s.norm, rows, residual, device, dtype)


def cases_of(
    s: Shape, norm: str, rows: int, residual: bool, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).requires_grad_()

    inputs = {"x": randn(rows, s.hidden_dim), "weight": randn(s.hidden_dim)}
    if norm == "layer_norm":
        inputs["bias"] = randn(s.hidden_dim)
    if residual:
        inputs["residual"] = randn(rows, s.hidden_dim)
    one_pass = inputs["x"].numel() * inputs["x"].itemsize
    tensors = 2 if residual else 1
    yield from both_directions(
        norm,
        inputs,
        after_add(EAGER[norm]) if residual else EAGER[norm],
        op=f"{norm} add" if residual else norm,
        shape=f"{s.name} {rows}x{s.hidden_dim}",
        dtype=dtype_name(inputs["x"]),
        # Backward reads dy and h, and dh where there is one, and writes dx.
        bytes=(2 * tensors * one_pass, (2 + tensors) * one_pass),
        flops=(0, 0),
    )
