"""attention and attention_decode against scaled_dot_product_attention, which runs there today.

Packed sequences are attended one by one by the eager code, as transformers' vision towers do.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, both_directions, dtype_name, forward
from vlmkernels import ops
from vlmkernels.testing.shapes import Shape, shape

# Images of different size, as dynamic resolution makes them; and windows of 8 x 8 patches.
IMAGES = (256, 400, 144, 576, 1024, 2304, 3600, 1480)
WINDOW = 64


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    cuda = device.startswith("cuda")
    randn = partial(torch.randn, device=device, dtype=dtype)
    for name in ("vit_l_14_336", "siglip_so400m_14_384", *(["vit_bigg_14_448"] if cuda else [])):
        yield from dense(randn, shape(name), 32 if cuda else 1, shape(name).num_tokens)
    for seqlen in (1024, 2048, 4096, 8192, 16384) if cuda else (256, 512, 1024):
        yield from dense(randn, shape("qwen2vl_7b"), 1, seqlen, on_line=True)
    for kind in ("window", "documents", "images", "bias"):
        yield from masked(randn, shape("qwen2vl_7b"), 4096 if cuda else 512, kind)
    yield from packed(randn, shape("qwen2vl_vision"), IMAGES if cuda else IMAGES[:4])
    yield from packed(randn, shape("qwen25vl_vision"), (WINDOW,) * (256 if cuda else 24))
    for name in ("qwen2vl_7b", "llava15_7b"):
        yield decode(randn, shape(name), *((16, 4096) if cuda else (2, 1024)))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    qt, kt, vt = (x.transpose(-3, -2) for x in (q, k, v))
    gqa = q.shape[-2] != k.shape[-2]
    out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal, enable_gqa=gqa)
    return out.transpose(-3, -2)


def dense(
    randn: Any, s: Shape, batch: int, seqlen: int, *, on_line: bool = False
) -> Iterator[Case]:
    q = randn(batch, seqlen, s.num_heads, s.head_dim).requires_grad_()
    k, v = (randn(batch, seqlen, s.num_heads_k, s.head_dim).requires_grad_() for _ in range(2))
    yield from both_directions(
        "attention",
        {"q": q, "k": k, "v": v, "causal": s.causal},
        sdpa,
        op="attention",
        shape=f"{s.name} {batch}x{seqlen} {s.num_heads}/{s.num_heads_k}x{s.head_dim}",
        dtype=dtype_name(q),
        **work(q, k, batch * seqlen**2, s),
        seqlen=seqlen if on_line else 0,
    )


def masked(randn: Any, s: Shape, seqlen: int, kind: str) -> Iterator[Case]:
    """Causal with a window of an eighth, eight packed documents, or two images of a quarter each;
    and full with a bias. The eager code's mask is made once, outside of the timing."""
    q = randn(1, seqlen, s.num_heads, s.head_dim).requires_grad_()
    k, v = (randn(1, seqlen, s.num_heads_k, s.head_dim).requires_grad_() for _ in range(2))
    i = torch.arange(seqlen, device=q.device)
    seen = i <= i[:, None]
    options: dict[str, Any] = {"causal": True}
    if kind == "window":
        options["window_size"] = (seqlen // 8, 0)
        seen = seen & (i >= i[:, None] - seqlen // 8)
    if kind == "documents":
        options["segment_ids"] = (i * 8 // seqlen).int()[None]
        seen = seen & (i * 8 // seqlen == (i * 8 // seqlen)[:, None])
    if kind == "images":
        image = torch.where(i * 4 // seqlen % 2 == 1, i * 4 // seqlen, -1)
        options["image_ids"] = image.int()[None]
        seen = seen | ((image == image[:, None]) & (image >= 0))
    if kind == "bias":
        options = {"bias": randn(1, s.num_heads, seqlen, seqlen).requires_grad_()}

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        mask = seen if bias is None else bias
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    pairs = seqlen**2 if kind == "bias" else 2 * int(seen.sum())  # work() halves for causal
    yield from both_directions(
        "attention",
        {"q": q, "k": k, "v": v, **options},
        eager,
        op="attention_masked",
        shape=f"{s.name} 1x{seqlen} {s.num_heads}/{s.num_heads_k}x{s.head_dim} {kind}",
        dtype=dtype_name(q),
        **work(q, k, pairs, s),
    )


def packed(randn: Any, s: Shape, lengths: tuple[int, ...]) -> Iterator[Case]:
    tokens, same = sum(lengths), len({*lengths}) == 1
    q, k, v = (randn(tokens, s.num_heads, s.head_dim).requires_grad_() for _ in range(3))
    cu_seqlens = torch.tensor((0, *lengths), device=q.device).cumsum(0).int()

    def eager(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([sdpa(*(x[None] for x in part))[0] for part in parts])

    sizes = f"{len(lengths)}x{lengths[0]}" if same else f"{len(lengths)} images {tokens}"
    yield from both_directions(
        "attention",
        {
            **{"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens},
            **{"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)},
        },
        eager,
        op="attention",
        shape=f"{s.name} packed {sizes} {s.num_heads}x{s.head_dim}",
        dtype=dtype_name(q),
        **work(q, k, sum(n * n for n in lengths), s),
    )


def work(q: Tensor, k: Tensor, pairs: int, s: Shape) -> dict[str, tuple[int, int]]:
    """Bytes and FLOPs of forward and backward; pairs of a query and a key, without the mask."""
    flops = 4 * pairs * s.num_heads * s.head_dim // (2 if s.causal else 1)
    num_bytes = 2 * (q.numel() + k.numel()) * q.itemsize
    # Backward reads q, k, v, out, dout and writes dq, dk, dv; five products instead of two.
    backward = (4 * q.numel() + 4 * k.numel()) * q.itemsize
    return {"bytes": (num_bytes, backward), "flops": (flops, 5 * flops // 2)}


def decode(randn: Any, s: Shape, batch: int, seqlen: int) -> Case:
    """One new token of every row against a full cache."""
    inputs: dict[str, Tensor] = {
        "q": randn(batch, 1, s.num_heads, s.head_dim),
        "k_cache": randn(batch, seqlen, s.num_heads_k, s.head_dim),
        "v_cache": randn(batch, seqlen, s.num_heads_k, s.head_dim),
    }
    seqlens = torch.full((batch,), seqlen, dtype=torch.int32, device=inputs["q"].device)
    inputs["cache_seqlens"] = seqlens

    def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Tensor:
        return sdpa(q, k_cache, v_cache)

    cache = inputs["k_cache"]
    return Case(
        op="attention_decode",
        shape=f"{s.name} {batch}x{seqlen} {s.num_heads}/{s.num_heads_k}x{s.head_dim}",
        dtype=dtype_name(cache),
        direction="fwd",
        bytes=2 * cache.numel() * cache.itemsize,
        flops=4 * batch * s.num_heads * seqlen * s.head_dim,
        variants={
            "vlmkernels": forward(ops.attention_decode, inputs),
            "eager": forward(eager, inputs),
        },
        function="attention_decode",
        inputs=inputs,
        eager=eager,
    )
