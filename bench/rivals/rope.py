"""Rivals of rope, mrope, vision_rope(_qkv): transformers' functions and Liger's kernels.

They read tables of cos and sin, which a model makes once for all layers: so do we here, untimed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.rivals import NotSupportedError, rival
from vlmkernels import ops
from vlmkernels.ops._rotation import angles as angles_of


@functools.lru_cache(maxsize=4)
def _tables(
    position_ids: Tensor,
    theta: float,
    head_dim: int,
    sections: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    angles = angles_of(position_ids, theta, head_dim, sections, layout)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@functools.lru_cache(maxsize=4)
def _tables_per_axis(
    position_ids: Tensor, theta: float, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(3, 1, num_tokens, head_dim), which Liger picks its sections from."""
    one = (head_dim // 2,)
    tables = [_tables(row, theta, head_dim, one, "sections", dtype) for row in position_ids]
    cos, sin = (torch.stack(parts)[:, None] for parts in zip(*tables, strict=True))
    return cos, sin


def _expect_whole(q: Tensor, rotary_dim: int | None, inplace: bool) -> None:
    if inplace or (rotary_dim or q.shape[-1]) != q.shape[-1]:
        raise NotSupportedError("partial or in place")


@rival("rope", "transformers", "transformers.models.qwen2")
def transformers_rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> Any:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    _expect_whole(q, rotary_dim, inplace)
    sections = (q.shape[-1] // 2,)
    cos, sin = _tables(position_ids, theta, q.shape[-1], sections, "sections", q.dtype)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=-2)


@rival("mrope", "transformers", "transformers.models.qwen2_vl")
def transformers_mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    theta: float = 1e6,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> Any:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    _expect_whole(q, rotary_dim, inplace)
    layout = "interleaved" if interleaved else "sections"
    cos, sin = _tables(position_ids, theta, q.shape[-1], tuple(sections), layout, q.dtype)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=-2)


@rival("vision_rope", "transformers", "transformers.models.qwen2_vl")
def transformers_vision_rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    *,
    theta: float = 10000.0,
    inplace: bool = False,
) -> Any:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    _expect_whole(q, None, inplace)
    sections = (q.shape[-1] // 4,) * 2
    tables = _tables(position_ids, theta, q.shape[-1], sections, "axial", torch.float32)
    return apply_rotary_pos_emb_vision(q, k, *tables)


@rival("vision_rope_qkv", "transformers", "transformers.models.qwen2_vl")
def transformers_vision_rope_qkv(
    qkv: Tensor, position_ids: Tensor, *, theta: float = 10000.0, inplace: bool = False
) -> Any:
    q, k, v = qkv.unbind(-3)
    return *transformers_vision_rope(q, k, position_ids, theta=theta, inplace=inplace), v


@rival("vision_rope_qkv", "ops.vision_rope of slices", "vlmkernels")
def slices_vision_rope_qkv(
    qkv: Tensor, position_ids: Tensor, *, theta: float = 10000.0, inplace: bool = False
) -> Any:
    q, k, v = qkv.unbind(-3)
    return *ops.vision_rope(q, k, position_ids, theta=theta, inplace=inplace), v


@rival("mrope", "Liger", "liger_kernel", needs_cuda=True)
def liger_mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    theta: float = 1e6,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> Any:
    """Liger writes into q and k, which only a copy hides; the copy is part of the time."""
    from liger_kernel.ops.qwen2vl_mrope import LigerQwen2VLMRopeFunction

    _expect_whole(q, rotary_dim, inplace)
    if interleaved or q.ndim != 3:
        raise NotSupportedError("sections, packed")
    cos, sin = _tables_per_axis(position_ids, theta, q.shape[-1], q.dtype)
    heads_first = [x.clone()[None].transpose(1, 2) for x in (q, k)]
    rotated = LigerQwen2VLMRopeFunction.apply(*heads_first, cos, sin, list(sections))
    return tuple(x.transpose(1, 2)[0] for x in rotated)
