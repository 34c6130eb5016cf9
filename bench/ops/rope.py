"""rope against transformers' code, which reads tables of cos and sin made once for all layers.

mrope and vision_rope compute cos and sin in every call; rope_from_tables reads the same tables.
q and k are slices of a fused qkv, as the models have them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, both_directions, dtype_name
from vlmkernels.testing.shapes import Shape, shape

SECTIONS = (16, 24, 24)


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
    scale = 16 if device.startswith("cuda") else 1
    for name, tokens in (
        *(("qwen2vl_7b", 512 * scale), ("qwen2vl_7b", 8), ("qwen2vl_2b", 512 * scale)),
        ("qwen2vl_vision", 1024 * scale),
    ):
        yield from cases_of(shape(name), tokens, device, dtype)


def cases_of(s: Shape, tokens: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    heads = [s.num_heads, s.num_heads_k, s.num_heads_k]
    qkv = torch.randn(tokens, sum(heads), s.head_dim, device=device, dtype=dtype)
    q, k, _ = qkv.requires_grad_().split(heads, dim=1)
    axes = 2 if s.is_vision else 3
    positions = torch.arange(tokens, device=device).repeat(axes, 1) % 1000
    positions = (positions * torch.arange(1, axes + 1, device=device)[:, None]) % 1000
    cos, sin = (t.to(torch.float32 if s.is_vision else dtype) for t in tables(positions, s))
    eager = eager_vision if s.is_vision else eager_text

    def eager_with_tables(q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return eager(q, k, cos, sin)

    numbers = q.numel() + k.numel()
    common: dict[str, Any] = {
        "shape": f"{s.name} {tokens} {s.num_heads}+{s.num_heads_k}x{s.head_dim}",
        "dtype": dtype_name(q),
        "bytes": (2 * numbers * q.itemsize,) * 2,
        "flops": (3 * numbers,) * 2,
    }
    rotary = {"q": q, "k": k, "position_ids": positions}
    if s.is_vision:
        yield from both_directions(
            "vision_rope", rotary, eager_with_tables, op="vision_rope", **common
        )
    else:
        rotary["sections"] = SECTIONS
        yield from both_directions("mrope", rotary, eager_with_tables, op="mrope", **common)
    if s.is_vision:
        yield from fused_cases(s, tokens, positions, (cos, sin), dtype)
    given = {"q": q, "k": k, "cos": cos, "sin": sin}
    yield from both_directions("rope_from_tables", given, eager, op="rope_from_tables", **common)


def fused_cases(
    s: Shape, tokens: int, positions: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Iterator[Case]:
    """From the packed projection: the gradient of qkv is one tensor, and v is part of it."""
    sizes = tokens, 3, s.num_heads, s.head_dim
    qkv = torch.randn(sizes, device=positions.device).to(dtype).requires_grad_()

    def eager(qkv: Tensor, **_: Any) -> tuple[Tensor, ...]:
        q, k, v = qkv.unbind(1)
        return *eager_vision(q, k, *tables), v

    yield from both_directions(
        "vision_rope_qkv",
        {"qkv": qkv, "position_ids": positions},
        eager,
        op="vision_rope_qkv",
        shape=f"{s.name} {tokens} 3x{s.num_heads}x{s.head_dim}",
        dtype=dtype_name(qkv),
        # Forward leaves v alone; backward moves it into the one gradient.
        bytes=(4 * qkv.numel() // 3 * qkv.itemsize, 2 * qkv.numel() * qkv.itemsize),
        flops=(2 * qkv.numel(), 2 * qkv.numel()),
    )


def tables(positions: Tensor, s: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin (num_tokens, head_dim), float32, as transformers' rotary modules give them."""
    pairs = s.head_dim // 2
    if s.is_vision:
        quarter = torch.arange(pairs // 2, device=positions.device).float()
        frequencies = 1e4 ** (-quarter / (pairs // 2))
        angles = torch.cat([row.float().outer(frequencies) for row in positions], dim=-1)
    else:
        steps = torch.arange(pairs, device=positions.device).float()
        sections = torch.tensor(SECTIONS, device=positions.device)
        axis = torch.arange(3, device=positions.device).repeat_interleave(sections)
        angles = positions.float()[axis].T * 1e6 ** (-steps / pairs)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
