"""norm against transformers' Qwen2RMSNorm and torch's layer_norm, with and without a residual."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case
from vlmkernels import ops


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' Qwen2RMSNorm.forward."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def eager_layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, weight)


def with_add(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight), h

    return run


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, weight)  # type: ignore[no-any-return]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return ops.layer_norm(x, weight, weight, residual=residual)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return ops.rms_norm(x, weight, residual=residual)


# op: (ours, eager)
NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (ops.rms_norm, eager_rms_norm),
    "rms_norm add": (add_rms_norm, with_add(eager_rms_norm)),
    "layer_norm": (layer_norm, eager_layer_norm),
    "layer_norm add": (add_layer_norm, with_add(eager_layer_norm)),
}
# name, rows on a CPU, width, norms
SHAPES = (
    ("qwen2vl_7b", 256, 3584, ("rms_norm", "rms_norm add")),
    ("qwen2vl_2b", 512, 1536, ("rms_norm",)),
    ("qwen2vl_vision", 1024, 1280, ("layer_norm", "layer_norm add")),
    ("siglip_so400m", 729, 1152, ("layer_norm",)),
    ("vit_b", 197, 768, ("layer_norm",)),
    ("qwen3_head", 8192, 128, ("rms_norm",)),
)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, rows, width, norms in SHAPES:
        rows = rows * 32 if device == "cuda" else rows
        for op in norms:
            yield from cases_of(device, dtype, op, name, rows, width)


def cases_of(
    device: str, dtype: torch.dtype, op: str, name: str, rows: int, width: int
) -> Iterator[Case]:
    tensors = 2 if op.endswith("add") else 1
    inputs = [torch.randn(rows, width, device=device).to(dtype) for _ in range(tensors)]
    inputs.append(torch.randn(width, device=device).to(dtype))
    variants = dict(zip(("vlmkernels", "eager"), NORMS[op], strict=True))
    directions: dict[str, dict[str, Callable[[], Any]]] = {
        "fwd": {key: partial(run, *inputs) for key, run in variants.items()},
        "bwd": {key: gradient(run, inputs) for key, run in variants.items()},
    }
    # Backward reads dy and h, and dh where there is one, and writes dx.
    passes = {"fwd": 2 * tensors, "bwd": 2 + tensors}
    for direction, runs in directions.items():
        yield Case(
            op=op,
            shape=f"{name} {rows}x{width}",
            dtype=str(dtype).removeprefix("torch."),
            direction=direction,
            bytes=passes[direction] * rows * width * dtype.itemsize,
            flops=0,
            variants=runs,
        )


def gradient(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs only the backward of run(*inputs)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
