"""Rivals of attention and attention_decode: PyTorch's backends, FlexAttention, flash-attention."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.rivals import NotSupportedError, rival


def _expect_dense(cu_seqlens_q: Tensor | None) -> None:
    if cu_seqlens_q is not None:
        raise NotSupportedError("dense only")


def _expect_plain(masks: dict[str, Any]) -> None:
    if given := [name for name, x in masks.items() if x is not None]:
        raise NotSupportedError(f"without {', '.join(given)}")


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        softmax_scale: float | None = None,
        cu_seqlens_q: Tensor | None = None,
        **masks: Any,
    ) -> Tensor:
        _expect_dense(cu_seqlens_q)
        _expect_plain(masks)
        if causal and q.shape[1] != k.shape[1]:
            raise NotSupportedError("causal is aligned top-left")
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[2] != k.shape[2]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                qt, kt, vt, is_causal=causal, scale=softmax_scale, enable_gqa=gqa
            )
        return out.transpose(1, 2)

    return call


for _backend, _name, _cuda in (
    (SDPBackend.FLASH_ATTENTION, "SDPA flash", False),
    (SDPBackend.EFFICIENT_ATTENTION, "SDPA mem-efficient", True),
    (SDPBackend.CUDNN_ATTENTION, "SDPA cuDNN", True),
    (SDPBackend.MATH, "SDPA math", False),
):
    rival("attention", _name, needs_cuda=_cuda)(_sdpa(_backend))


@rival("attention", "torch varlen_attn", "torch.nn.attention.varlen", needs_cuda=True)
def varlen_attn(
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
    **masks: Any,
) -> Any:
    from torch.nn.attention.varlen import varlen_attn as call

    _expect_plain(masks)
    if cu_seqlens_q is None or max_seqlen_q is None:
        raise NotSupportedError("packed only")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    lengths = (max_seqlen_q, max_seqlen_k or max_seqlen_q)
    window = (-1, 0) if causal else (-1, -1)
    return call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, scale=softmax_scale, window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _block_mask(
    causal: bool, lengths: tuple[int, int], cu_seqlens: Tensor | None, device: str
) -> Any:
    """FlexAttention's mask; made once and kept, as in a model whose layers share it."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents = torch.zeros(lengths[0], dtype=torch.int32, device=device)
    if cu_seqlens is not None:
        documents[cu_seqlens[1:-1].long()] = 1
        documents = documents.cumsum(0, dtype=torch.int32)
    offset = lengths[1] - lengths[0]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i + offset >= j) if causal else (j >= 0)
        return seen & (documents[i] == documents[j]) if cu_seqlens is not None else seen

    return create_block_mask(visible, None, None, *lengths, device=device)


@functools.lru_cache(maxsize=8)
def _masked_blocks(
    seqlen: int, left: int, segments: Tensor | None, images: Tensor | None, device: str
) -> Any:
    """Causal with a window, documents and bidirectional images."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (j >= i - left) if left >= 0 else j <= i
        if images is not None:
            seen = seen | ((images[0, i] == images[0, j]) & (images[0, i] >= 0))
        return seen if segments is None else seen & (segments[0, i] == segments[0, j])

    return create_block_mask(visible, None, None, seqlen, seqlen, device=device)


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@rival("attention", "FlexAttention", "torch.nn.attention.flex_attention")
def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    segment_ids: Tensor | None = None,
    image_ids: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **masks: Any,
) -> Tensor:
    _expect_plain(masks)
    packed = cu_seqlens_q is not None
    if packed and cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q:
        raise NotSupportedError("cu_seqlens_k differs")
    axis = 0 if packed else 1
    mask = None
    if segment_ids is not None or image_ids is not None or window_size != (-1, -1):
        mask = _masked_blocks(q.shape[1], window_size[0], segment_ids, image_ids, str(q.device))
    elif packed or causal:
        lengths = (q.shape[axis], k.shape[axis])
        mask = _block_mask(causal, lengths, cu_seqlens_q, str(q.device))
    parts = [(x[None] if packed else x).transpose(1, 2) for x in (q, k, v)]
    gqa = q.shape[-2] != k.shape[-2]
    out = _flex()(*parts, block_mask=mask, scale=softmax_scale, enable_gqa=gqa).transpose(1, 2)
    return out[0] if packed else out  # type: ignore[no-any-return]


def _flash(module: str) -> Callable[..., Any]:
    """flash_attn_func and flash_attn_varlen_func: one interface since version 2."""

    def call(
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
        window_size: tuple[int, int] = (-1, -1),
        **masks: Any,
    ) -> Any:
        _expect_plain(masks)
        library = __import__(module, fromlist=["flash_attn_func"])
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale}
        options["window_size"] = window_size
        if cu_seqlens_q is None:
            out = library.flash_attn_func(q, k, v, **options)
        else:
            options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
            options["cu_seqlens_k"] = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
            options["max_seqlen_k"] = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
            out = library.flash_attn_varlen_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def _flash_decode(module: str) -> Callable[..., Any]:
    def call(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> Any:
        library = __import__(module, fromlist=["flash_attn_with_kvcache"])
        options = {"causal": causal, "softmax_scale": softmax_scale}
        out = library.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, **options
        )
        return out[0] if isinstance(out, tuple) else out

    return call


for _name, _module in (
    ("flash-attn 2", "flash_attn"),
    ("flash-attn 3", "flash_attn_interface"),
    ("fa3-fwd", "fa3_fwd_interface"),
    ("flash-attn 4", "flash_attn.cute.interface"),
):
    rival("attention", _name, _module, needs_cuda=True)(_flash(_module))
    if "cute" not in _module:
        rival("attention_decode", _name, _module, needs_cuda=True)(_flash_decode(_module))


@rival("attention_decode", "SDPA")
def sdpa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    **_: Any,
) -> Tensor:
    """PyTorch's choice of backend, with a mask over the whole cache."""
    j = torch.arange(k_cache.shape[1], device=q.device)
    last = cache_seqlens[:, None].expand(-1, q.shape[1])
    if causal:
        last = last - torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    mask = (j < last[..., None])[:, None]
    gqa = q.shape[2] != k_cache.shape[2]
    out = F.scaled_dot_product_attention(
        qt, kt, vt, attn_mask=mask, scale=softmax_scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)
