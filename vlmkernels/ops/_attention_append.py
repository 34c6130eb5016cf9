"""kv_cache_append: new keys and values into a KV cache, rotated on the way."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops._attention_decode import expect_no_gradient


@_library.public
def kv_cache_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    q: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    one_position: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | None:
    """k_cache[b, p] = R(p) k[b, i],  v_cache[b, p] = v[b, i],  p = cache_seqlens[b] + i, in place.

    R(p) rotates the first rotary_dim elements of a head by the angles of row p of cos and sin
    (no rotation without them). One kernel, without gradient. cache_seqlens itself stays as it is.

    Args:
        k, v: (batch, seqlen_new, num_heads_k, head_dim).
        k_cache, v_cache: (batch, max_seqlen, num_heads_k, head_dim); with block_table
            (num_pages, page_size, num_heads_k, head_dim), page_size a multiple of 16.
        cache_seqlens: int32 (batch,), from 0 to max_seqlen - seqlen_new (checked on the CPU; on
            CUDA what does not fit is dropped).
        q: (batch, seqlen_q, num_heads, head_dim), to be rotated too.
        cos, sin: (max_seqlen or more, rotary_dim / 2), float32 or the dtype of k; rotary_dim a
            multiple of 16 up to head_dim.
        interleaved: pairs are elements (2 i, 2 i + 1), else (i, i + rotary_dim / 2).
        one_position: all of q is at cache_seqlens[b], else query i at cache_seqlens[b] + i.
        block_table: as in `attention_decode`.

    Returns:
        q rotated, a new tensor; q itself (or None) without cos and sin.

    Raises:
        ValueError, TypeError: as `attention_decode`.

    Source: RoFormer (arXiv 2104.09864), flash-attention's flash_attn_with_kvcache.
    """
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    expect_no_gradient("kv_cache_append", **tensors, **({} if q is None else {"q": q}))
    if cos is None and sin is not None:
        raise ValueError("kv_cache_append: cos must be given with sin, got None")
    rotates = q is not None and cos is not None
    out = _op(
        q if rotates else None, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin,
        interleaved, one_position,
    )  # fmt: skip
    return out if rotates else q


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (seqlen, num_heads, head_dim) by rows of cos and sin (seqlen or 1, rotary_dim / 2)."""
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    turning = x[..., : 2 * half].to(dtype)
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def reference(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    one_position: bool,
) -> Tensor:
    queries = []
    for row, begin in enumerate(cache_seqlens.tolist()):
        position = torch.arange(begin, begin + k.shape[1], device=k.device)
        keys = k[row]
        if cos is not None and sin is not None:
            keys = rotate(keys, cos[position], sin[position], interleaved)
            if q is not None:
                count = 1 if one_position else q.shape[1]
                of_q = torch.arange(begin, begin + count, device=k.device)
                queries.append(rotate(q[row], cos[of_q], sin[of_q], interleaved))
        rows: Any = row
        if block_table is not None:
            page_size = k_cache.shape[1]
            rows = block_table[row, position // page_size].long()
            position = position % page_size
        k_cache[rows, position] = keys
        v_cache[rows, position] = v[row]
    if q is None:
        return k.new_empty(0)
    return torch.stack(queries) if queries else q.clone()


def _fake(q: Tensor | None, k: Tensor, *rest: Any) -> Tensor:
    return k.new_empty(0) if q is None else _library.empty(q)


def _kernel(q: Tensor | None, k: Tensor, *rest: Any) -> Tensor:
    out = _fake(q, k)
    if not _core.C.kv_cache_append(q, None if q is None else out, k, *rest):
        return reference(q, k, *rest)
    return out


_op = _library.define(
    "kv_cache_append(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved, "
    "bool one_position) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
)
