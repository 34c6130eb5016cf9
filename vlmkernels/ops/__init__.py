"""TEMPORARY pure-PyTorch stand-ins with the signatures of the real ops, until those land."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Any:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    if cu_seqlens_q is None:
        return dense(q, k, v)
    lengths = cu_seqlens_q.diff().tolist()
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v))
        return dense(q, k, v).flatten(0, 1)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([dense(a[None], b[None], c[None])[0] for a, b, c in parts])


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **kwargs: Any
) -> Tensor:
    rows = []
    for i, n in enumerate(cache_seqlens.tolist()):
        a, b, c = (x[i : i + 1].transpose(1, 2) for x in (q, k_cache[:, :n], v_cache[:, :n]))
        mask = torch.ones(q.shape[1], n, dtype=torch.bool, device=q.device).tril(n - q.shape[1])
        out = F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, enable_gqa=a.shape[1] != b.shape[1]
        )
        rows.append(out.transpose(1, 2))
    return torch.cat(rows)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (
        t.repeat(*([1] * (t.ndim - 1)), 2).unsqueeze(-2) for t in (angles.cos(), angles.sin())
    )
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Any,
    *,
    interleaved: bool = False,
    theta: float = 1e6,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    dim = q.shape[-1]
    freq = theta ** -(torch.arange(0, dim, 2, device=q.device, dtype=torch.float32) / dim)
    angles = position_ids[..., None].float() * freq
    angles = torch.cat([m[i] for i, m in enumerate(angles.split(list(sections), dim=-1))], dim=-1)
    return _rotate(q, angles), _rotate(k, angles)


def vision_rope(
    q: Tensor, k: Tensor, position_ids: Tensor, *, theta: float = 10000.0, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    dim = q.shape[-1] // 2
    freq = theta ** -(torch.arange(0, dim, 2, device=q.device, dtype=torch.float32) / dim)
    angles = torch.cat(list(position_ids[..., None].float() * freq), dim=-1)
    return _rotate(q, angles), _rotate(k, angles)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.shape[-1],), weight, eps)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (h.shape[-1],), weight, bias, eps)
    return y if residual is None else (y, h)


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    return F.linear(x, weight.flatten(1), bias)
