"""attention_decode: the newest tokens against a KV cache, paged or not."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops._attention_reference import dense, empty_lse, visible
from vlmkernels.ops.attention import scale, window


@_library.public
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the newest tokens of each sequence against its KV cache; without gradient.

    Row b sees the keys 0 to cache_seqlens[b] of its cache, the new tokens included (write them to
    the cache first, for example with `kv_cache_append`); nothing beyond them, and nothing outside
    of the window, is read. Few queries are split over the keys, so that one long sequence occupies
    the whole GPU.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), the last seqlen_q tokens of each sequence.
        k_cache, v_cache: (batch, max_seqlen, num_heads_k, head_dim); with block_table
            (num_pages, page_size, num_heads_k, head_dim), page_size a multiple of 16.
        cache_seqlens: int32 (batch,), from 0 to max_seqlen (checked on the CPU, clamped on CUDA).
            float32 and float64 on CUDA run through PyTorch, which waits for the GPU to read them.
        causal: bottom-right: query i sees the keys j <= i + cache_seqlens[b] - seqlen_q.
        softmax_scale, window_size, softcap, return_lse: as in `attention`.
        block_table: int32 (batch, pages): key j of row b is in page block_table[b, j // page_size]
            at j % page_size. Entries beyond cache_seqlens are not read. On CUDA their values are
            the caller's responsibility.

    Returns:
        out as q, or (out, lse) with lse (batch, num_heads, seqlen_q).

    Raises:
        ValueError, TypeError: as `attention`.
        ValueError: a gradient would be needed.

    Source: Flash-Decoding (pytorch.org/blog/flash-decoding), FlashAttention-2 (arXiv 2307.08691),
    PagedAttention (arXiv 2309.06180).
    """
    expect_no_gradient("attention_decode", q=q, k_cache=k_cache, v_cache=v_cache)
    q, k_cache, v_cache = _library.autocast(q, k_cache, v_cache)
    options = (*window(causal, window_size), scale(q, softmax_scale), softcap)
    out, lse = _op(q, k_cache, v_cache, cache_seqlens, block_table, *options)
    return (out, lse) if return_lse else out


def expect_no_gradient(op: str, **tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x.requires_grad:
            raise ValueError(
                f"{op}: {name} has no gradient here, expected torch.no_grad() or tensors that do "
                "not require one, got requires_grad=True (attention has one)"
            )


def gather_pages(cache: Tensor, block_table: Tensor, row: int, length: int) -> Tensor:
    """The first keys of a row of a paged cache, (length, num_heads_k, head_dim)."""
    pages = block_table[row, : -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length]


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    pages = 1 if block_table is None else block_table.shape[1]
    parts = []
    for row, n in enumerate(cache_seqlens.clamp(0, pages * k_cache.shape[1]).tolist()):
        k, v = (
            x[row, :n] if block_table is None else gather_pages(x, block_table, row, n)
            for x in (k_cache, v_cache)
        )
        none = (None, None)
        seen = visible(q.shape[1], n, (window_left, window_right), none, none, None, q.device)
        parts.append(dense(q[row : row + 1], k[None], v[None], seen, None, softmax_scale, softcap))
    if not parts:
        return _fake(q)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _library.empty(q), empty_lse(q)


def _kernel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_splits = _core.C.attention_decode_splits(q, k_cache, v_cache, block_table)
    out, lse = _fake(q)
    partial_out = partial_lse = None
    if num_splits > 1:
        partial_out = q.new_empty((num_splits, *q.shape), dtype=torch.float32)
        partial_lse = q.new_empty((num_splits, *lse.shape), dtype=torch.float32)
    inputs = (q, k_cache, v_cache, cache_seqlens, block_table)
    if not _core.C.attention_decode(*inputs, out, lse, partial_out, partial_lse, *options):
        return reference(*inputs, *options)
    return out, lse


_op = _library.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, int window_left, int window_right, float softmax_scale, float softcap) "
    "-> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
)
