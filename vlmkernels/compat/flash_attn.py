"""flash-attention's functions and torch's scaled_dot_product_attention, on `ops.attention`.

Same names, keywords and defaults as flash-attn 2 and torch; what is not supported raises ValueError
and says what to use. All run on every device, at any head_dim that is a multiple of 8 up to 256.
"""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.ops._library import public

Result = Tensor | tuple[Tensor, Tensor]


def _refuse(function: str, **given: tuple[Any, str]) -> None:
    """given: keyword = (whether it asks for something, what to use instead)."""
    for name, (asked, instead) in given.items():
        if asked:
            raise ValueError(f"{function}: {name} is not supported; {instead}")


_DROPOUT = "train without dropout of attention weights (dropout_p=0)"
_ALIBI = "pass it as ops.attention(bias=...)"
_PROBS = "attention weights are never formed; ops.attention(return_lse=True) gives lse"


@public
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """out = softmax(softmax_scale q k^T + mask) v, causal and window aligned bottom-right.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); k, v: (batch, seqlen_k, num_heads_k, head_dim).
        deterministic: the gradient always is.

    Raises:
        ValueError: dropout_p, alibi_slopes or return_attn_probs is asked for; else as
            `ops.attention`.
    """
    _refuse(
        "flash_attn_func",
        dropout_p=(dropout_p, _DROPOUT),
        alibi_slopes=(alibi_slopes is not None, _ALIBI),
        return_attn_probs=(return_attn_probs, _PROBS),
    )
    return ops.attention(  # type: ignore[return-value]
        q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size,
        softcap=softcap,
    )  # fmt: skip


@public
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn_func` of packed sequences: q (num_tokens_q, num_heads, head_dim).

    Args:
        k, v: (num_tokens_k, num_heads_k, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,).
        max_seqlen_q, max_seqlen_k: the longest sequences, or more.

    Raises:
        ValueError: dropout_p, alibi_slopes, return_attn_probs or block_table is asked for; else as
            `ops.attention`.
    """
    _refuse(
        "flash_attn_varlen_func",
        dropout_p=(dropout_p, _DROPOUT),
        alibi_slopes=(alibi_slopes is not None, _ALIBI),
        return_attn_probs=(return_attn_probs, _PROBS),
        block_table=(block_table is not None, "use flash_attn_with_kvcache for a paged cache"),
    )
    return ops.attention(  # type: ignore[return-value]
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, softmax_scale=softmax_scale,
        window_size=window_size, softcap=softcap,
    )  # fmt: skip


@public
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of q to a KV cache, to which k and v, if given, are appended in place first.

    With rotary_cos and rotary_sin q and k are rotated at the positions that they get in the cache
    (q at cache_seqlens alone where neither causal nor a window asks for positions).

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); k, v: (batch, seqlen_new, num_heads_k, head_dim).
        k_cache, v_cache: (batch, max_seqlen, num_heads_k, head_dim), with block_table pages.
        rotary_cos, rotary_sin: (max_seqlen or more, rotary_dim / 2), rotary_dim a multiple of 16.
        cache_seqlens: int, or int32 (batch,): keys before the new ones; max_seqlen by default.
        block_table: int32 (batch, pages).
        num_splits: ignored: the split is chosen by size.

    Returns:
        out, or (out, lse).

    Raises:
        ValueError: cache_batch_idx, cache_leftpad or alibi_slopes is given; rotary tables without
            k; else as `ops.attention_decode` and `ops.kv_cache_append`.
    """
    _refuse(
        "flash_attn_with_kvcache",
        cache_batch_idx=(cache_batch_idx is not None, "index the caches, or use block_table"),
        cache_leftpad=(cache_leftpad is not None, "begin each row of the cache at 0"),
        alibi_slopes=(alibi_slopes is not None, _ALIBI),
        v=((k is None) != (v is None), "give k and v together"),
        rotary_cos=(rotary_cos is not None and k is None, "give k, which is rotated with q"),
        rotary_sin=((rotary_cos is None) != (rotary_sin is None), "give both rotary tables"),
    )
    if cache_seqlens is None:
        pages = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = pages * k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        rotated = ops.kv_cache_append(
            k, v, k_cache, v_cache, cache_seqlens, q=q, cos=rotary_cos, sin=rotary_sin,
            interleaved=rotary_interleaved, block_table=block_table,
            one_position=not causal and tuple(window_size) == (-1, -1),
        )  # fmt: skip
        q = q if rotated is None else rotated
        cache_seqlens = cache_seqlens + k.shape[1]
    return ops.attention_decode(
        q, k_cache, v_cache, cache_seqlens, causal=causal, softmax_scale=softmax_scale,
        window_size=window_size, softcap=softcap, block_table=block_table,
        return_lse=return_softmax_lse,
    )  # fmt: skip


@public
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """out = softmax(scale query key^T + attn_mask) value, in torch's layout, causal top-left.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim); key, value: (batch, num_heads_k, seqlen_k,
            head_dim); num_heads_k = num_heads, unless enable_gqa.
        attn_mask: broadcastable to (batch, num_heads, seqlen_q, seqlen_k): bool (True: takes part)
            or added; a float mask has a gradient.
        is_causal: query i sees the keys j <= i.

    Raises:
        ValueError: dropout_p is asked for; attn_mask together with is_causal; key heads differ
            without enable_gqa; else as `ops.attention`.
    """
    name = "scaled_dot_product_attention"
    _refuse(name, dropout_p=(dropout_p, _DROPOUT))
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            f"{name}: query, key and value must have shape (batch, num_heads, seqlen, head_dim), "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: attn_mask must be None with is_causal=True, as in torch")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"{name}: key must have the num_heads of query ({query.shape[1]}) unless "
            f"enable_gqa=True, got {key.shape[1]}"
        )
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    window = (-1, -1)
    if is_causal:  # j <= i is j - (i + seqlen_k - seqlen_q) <= seqlen_q - seqlen_k
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
        window = (-1, max(seqlen_q - seqlen_k, 0))
    bias = None if attn_mask is None else _bias(attn_mask, query, seqlen_k)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = ops.attention(q, k, v, softmax_scale=scale, window_size=window, bias=bias)
    return out.transpose(1, 2)  # type: ignore[union-attr]


def _bias(mask: Tensor, query: Tensor, seqlen_k: int) -> Tensor:
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask.expand(*mask.shape[:2], query.shape[2], seqlen_k)
