"""What the ops that rotate q and k share: whose angle a pair takes, and how it turns."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def head_dim(q: Tensor) -> int:
    if q.ndim < 3:
        shape = "(num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim)"
        raise ValueError(f"rope: q must have shape {shape}, got {tuple(q.shape)}")
    return q.shape[-1]


def check_sections(sections: list[int]) -> None:
    if list(map(type, sections)) != [int, int, int]:
        raise ValueError(f"rope: sections must be three ints (t, h, w), got {sections}")


@functools.lru_cache(maxsize=64)
def frequencies(
    theta: float, rotary_dim: int, sections: tuple[int, ...], layout: str
) -> tuple[list[float], list[int]]:
    """inv_freq, a float32 value, and axis of each of the rotary_dim/2 pairs.

    inv_freq is computed by the very expression of transformers: at position 10^6 one last bit of it
    is an angle of 0.06. No tensors: one made under a FakeTensorMode would stay in the cache.
    """
    pairs = rotary_dim // 2
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"rope: theta must be finite and above 0, got {theta}")
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > 256:
        raise ValueError(f"rope: rotary_dim must be even and in 2..256, got {rotary_dim}")
    if len(sections) not in ((3,) if layout == "interleaved" else (1, 2, 3)):
        raise ValueError(f"rope: sections must be of three axes at most, got {list(sections)}")
    if sum(sections) != pairs or min(sections) < 0:
        need = f"must be non-negative and sum to rotary_dim/2 = {pairs}"
        raise ValueError(f"rope: sections {need}, got {list(sections)}")
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    if layout == "interleaved":
        axes = [i % 3 if i < 3 * (0, *sections[1:])[i % 3] else 0 for i in range(pairs)]
        if [axes.count(axis) for axis in range(3)] != list(sections):
            raise ValueError(f"rope: sections {list(sections)} cannot be interleaved")
    dim = rotary_dim // 2 if layout == "axial" else rotary_dim
    with _disable_current_modes():
        powers = theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
        inv_freq = (1.0 / powers).tolist()
    return inv_freq * (len(sections) if layout == "axial" else 1), axes


@functools.lru_cache(maxsize=64)
def frequencies_of_core(
    theta: float, rotary_dim: int, sections: tuple[int, ...], layout: str
) -> tuple[Tensor, Tensor]:
    """`frequencies` as the core takes them: float32 and int64 tensors on the CPU."""
    inv_freq, axis = frequencies(theta, rotary_dim, sections, layout)
    with _disable_current_modes(), torch.inference_mode(False):
        return (
            torch.tensor(inv_freq, dtype=torch.float32, device="cpu"),
            torch.tensor(axis, dtype=torch.int64, device="cpu"),
        )


def angles(
    position_ids: Tensor, theta: float, rotary_dim: int, sections: Sequence[int], layout: str
) -> Tensor:
    """(..., rotary_dim/2) float32."""
    inv_freq, axis = frequencies(theta, rotary_dim, tuple(sections), layout)
    positions = position_ids.unsqueeze(0) if len(sections) == 1 else position_ids
    device = positions.device
    by_pair = positions.float()[torch.tensor(axis, device=device)].movedim(0, -1)
    return by_pair * torch.tensor(inv_freq, dtype=torch.float32, device=device)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    pairs = cos.shape[-1]
    a, b, rest = x.to(compute).split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def heads(x: Tensor) -> Tensor:
    """x with contiguous heads: the gradient of a sum has stride 0."""
    return x if x.stride(-1) == 1 else x.contiguous()
