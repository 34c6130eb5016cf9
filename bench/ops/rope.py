"""rope against transformers' code, which reads tables of cos and sin made once per forward pass.

`vlmkernels` computes cos and sin in every call, `vlmkernels from tables` reads the same tables.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from vlmkernels import ops


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def eager_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb; cos and sin are of q's dtype."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb_vision; cos and sin are float32."""
    rotated = eager_text(q.float(), k.float(), cos, sin)
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    scale = 16 if device == "cuda" else 1
    # name, tokens, num_heads, num_heads_k, head_dim
    for shape in (
        ("qwen2vl_7b", 512 * scale, 28, 4, 128),
        ("qwen2vl_7b decode", 8, 28, 4, 128),
        ("qwen2vl_vision", 1024 * scale, 16, 16, 80),
    ):
        yield from cases_of(device, dtype, *shape)


def cases_of(
    device: str, dtype: torch.dtype, name: str, tokens: int, heads: int, heads_k: int, head_dim: int
) -> Iterator[Case]:
    """Forward and backward; q and k are slices of a fused qkv, as the models have them."""
    vision = "vision" in name
    qkv = torch.randn(tokens, heads + 2 * heads_k, head_dim, device=device).to(dtype)
    q, k, _ = qkv.split([heads, heads_k, heads_k], dim=1)
    positions = torch.arange(tokens, device=device).repeat(2 if vision else 3, 1) % 1000
    angles = positions[0].unsqueeze(-1) * 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    cos, sin = (
        t.repeat(1, 2).to(torch.float32 if vision else dtype) for t in (angles.cos(), angles.sin())
    )
    eager = eager_vision if vision else eager_text

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if vision:
            return ops.vision_rope(q, k, positions)
        return ops.mrope(q, k, positions, (16, 24, 24))

    rotations = {
        "vlmkernels": ours,
        "vlmkernels from tables": lambda q, k: ops.rope_from_tables(q, k, cos, sin),
        "eager": lambda q, k: eager(q, k, cos, sin),
    }
    directions: dict[str, dict[str, Callable[[], Any]]] = {
        "fwd": {name: partial(rotate, q, k) for name, rotate in rotations.items()},
        "bwd": {name: gradient(rotate, q, k) for name, rotate in rotations.items()},
    }
    for direction, variants in directions.items():
        yield Case(
            op="rope",
            shape=f"{name} {tokens}x{heads}+{heads_k}x{head_dim}",
            dtype=str(dtype).removeprefix("torch."),
            direction=direction,
            bytes=2 * (q.numel() + k.numel()) * dtype.itemsize,
            flops=3 * (q.numel() + k.numel()),
            variants=variants,
        )


def gradient(
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs only the backward of rotate(q, k)."""
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    outputs = rotate(*inputs)
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
