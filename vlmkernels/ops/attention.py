"""attention: exact softmax attention, dense or packed, and decoding against a KV cache."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library


@_library.public
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
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale q k^T + mask) v;  lse = log sum exp(softmax_scale q k^T + mask).

    Dense, or packed when cu_seqlens_q is given: sequence b is then the tokens cu_seqlens[b] to
    cu_seqlens[b + 1], and sees itself only. `causal` is aligned bottom-right: query i of a sequence
    sees the keys j <= i + seqlen_k - seqlen_q. A query that sees no key gets out 0 and lse -inf,
    and passes no gradient. Sequences may be empty.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), packed (num_tokens_q, num_heads, head_dim);
            head_dim a multiple of 8 up to 256. Any strides with head_dim contiguous (slices of a
            fused qkv); on CUDA rows start at multiples of 16 bytes.
        k, v: (batch, seqlen_k, num_heads_k, head_dim), packed (num_tokens_k, num_heads_k,
            head_dim); num_heads_k divides num_heads (GQA, MQA).
        softmax_scale: positive; 1 / sqrt(head_dim) by default.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,) on the device of q, from 0 up to num_tokens.
            cu_seqlens_k is cu_seqlens_q by default. On the CPU the values are checked; on CUDA,
            where that would wait for the GPU, they are the caller's responsibility.
        max_seqlen_q, max_seqlen_k: at least the longest sequence. Found from cu_seqlens by default,
            which waits for the GPU (under torch.compile: num_tokens, correct but slower).
        return_lse: return (out, lse).

    Returns:
        out as q, contiguous; lse float32 (float64 for float64), differentiable,
        (batch, num_heads, seqlen_q), packed (num_heads, num_tokens_q).
        float16 and bfloat16 run through tensor cores and accumulate in float32; float32 on CUDA and
        float64 run through PyTorch. The gradient is deterministic. Under autocast q, k and v are
        cast first, as by scaled_dot_product_attention.

    Raises:
        ValueError: shapes, strides, head_dim, softmax_scale or lengths are not as above.
        TypeError: dtypes or devices differ, or cu_seqlens is not int32.

    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    q, k, v = _library.autocast(q, k, v)
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("attention: cu_seqlens_k is given, cu_seqlens_q is not")
        max_seqlen_q = max_seqlen_k = 0
    else:
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
            max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if max_seqlen_q is None:
            max_seqlen_q = _max_seqlen(cu_seqlens_q, q)
            if cu_seqlens_k is cu_seqlens_q and max_seqlen_k is None:
                max_seqlen_k = max_seqlen_q
        if max_seqlen_k is None:
            max_seqlen_k = _max_seqlen(cu_seqlens_k, k)
    out, lse = _op(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        _scale(q, softmax_scale),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@_library.public
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the newest tokens of each sequence against its KV cache; without gradient.

    Row b sees the keys 0 to cache_seqlens[b] of its cache, the new tokens included (write them to
    the cache first); nothing beyond them is read. Few queries are split over the keys, so that one
    long sequence occupies the whole GPU.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), the last seqlen_q tokens of each sequence.
        k_cache, v_cache: (batch, max_seqlen, num_heads_k, head_dim).
        cache_seqlens: int32 (batch,), from 0 to max_seqlen (checked on the CPU, clamped on CUDA).
            float32 and float64 on CUDA run through PyTorch, which waits for the GPU to read them.
        causal: bottom-right: query i sees the keys j <= i + cache_seqlens[b] - seqlen_q.
        softmax_scale, return_lse: as in `attention`.

    Returns:
        out as q, or (out, lse) with lse (batch, num_heads, seqlen_q).

    Raises:
        ValueError, TypeError: as `attention`.
        ValueError: a gradient would be needed.

    Source: Flash-Decoding (pytorch.org/blog/flash-decoding), FlashAttention-2 (arXiv 2307.08691).
    """
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            if x.requires_grad:
                raise ValueError(
                    f"attention_decode: {name} has no gradient here, expected torch.no_grad() or "
                    "tensors that do not require one, got requires_grad=True (attention has one)"
                )
    q, k_cache, v_cache = _library.autocast(q, k_cache, v_cache)
    out, lse = _decode_op(q, k_cache, v_cache, cache_seqlens, causal, _scale(q, softmax_scale))
    return (out, lse) if return_lse else out


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale


def _max_seqlen(cu_seqlens: Tensor, tokens: Tensor) -> int:
    if torch.compiler.is_compiling() or cu_seqlens.device.type == "meta":
        return tokens.shape[0]
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        return 0  # the core says what is wrong with it
    return int(cu_seqlens.diff().max())


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense(q, k, v, causal, softmax_scale)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        _dense(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    if not parts:  # no sequence at all, hence no token
        return q * 1, q.new_empty((q.shape[1], 0), dtype=_lse_dtype(q))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    # Autocast would make halves of the sums that dtype is for.
    with torch.autocast(q.device.type, enabled=False):
        dtype = _lse_dtype(q)
        heads_per_key_head = q.shape[2] // k.shape[2]
        qt = q.transpose(1, 2).to(dtype)
        kt = k.transpose(1, 2).to(dtype).repeat_interleave(heads_per_key_head, dim=1)
        vt = v.transpose(1, 2).to(dtype).repeat_interleave(heads_per_key_head, dim=1)
        scores = qt @ kt.transpose(2, 3) * softmax_scale
        if causal:
            scores = scores.masked_fill(_future(scores), -torch.inf)
        lse = _logsumexp(scores)
        probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        return (probabilities @ vt).transpose(1, 2).to(q.dtype).contiguous(), lse


def _logsumexp(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:  # torch.logsumexp wants at least one
        return scores.sum(-1) - torch.inf
    return scores.logsumexp(-1)


def _future(scores: Tensor) -> Tensor:
    """True where query i of the last two dimensions must not see key j."""
    seqlen_q, seqlen_k = scores.shape[-2:]
    i = torch.arange(seqlen_q, device=scores.device)[:, None]
    return torch.arange(seqlen_k, device=scores.device) > i + (seqlen_k - seqlen_q)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=_lse_dtype(q))


def _kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _expect_heads(q)
    out, lse = _fake(q, k, v, *rest)
    if not _core.C.attention(q, k, v, out, lse, *rest):
        return reference(q, k, v, *rest)
    return out, lse


def _expect_heads(q: Tensor) -> None:
    if q.dim() < 3:  # no lse shape: let the core say what is wrong
        raise ValueError(
            "attention: q must have shape (batch, seqlen, num_heads, head_dim) or "
            f"(num_tokens, num_heads, head_dim), got {tuple(q.shape)}"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = _backward_op(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *gradients, *(None for _ in range(6))


def _backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _library.reference_gradients(
        lambda q, k, v: reference(q, k, v, *options), (q, k, v), (dout, dlse)
    )
    dq, dk, dv = (
        torch.zeros_like(x) if dx is None else dx
        for x, dx in zip((q, k, v), gradients, strict=True)
    )
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_kernel(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dout = dout.contiguous()
    if dout.data_ptr() % 16:  # a view at an odd offset: nobody could align it for the kernel
        dout = dout.clone()
    dlse = None if dlse is None else dlse.contiguous()
    gradients = _backward_fake(dout, dlse, q, k, v)
    delta = lse.new_empty((2, *lse.shape))
    if not _core.C.attention_backward(dout, dlse, q, k, v, out, lse, delta, *gradients, *options):
        return _backward_reference(dout, dlse, q, k, v, out, lse, *options)
    return gradients


def decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    lengths = cache_seqlens.clamp(0, k_cache.shape[1]).tolist()
    parts = [
        _dense(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], causal, softmax_scale)
        for b, n in enumerate(lengths)
    ]
    if not parts:
        return _decode_fake(q, k_cache, v_cache, cache_seqlens, causal, softmax_scale)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=_lse_dtype(q))


def _decode_kernel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    num_splits = _core.C.attention_decode_splits(q, k_cache, v_cache)
    out, lse = _decode_fake(q, k_cache, v_cache, cache_seqlens, *options)
    partial_out = partial_lse = None
    if num_splits > 1:
        partial_out = q.new_empty((num_splits, *q.shape), dtype=torch.float32)
        partial_lse = q.new_empty((num_splits, *lse.shape), dtype=torch.float32)
    tensors = (q, k_cache, v_cache, cache_seqlens, out, lse, partial_out, partial_lse)
    if not _core.C.attention_decode(*tensors, *options):
        return decode_reference(q, k_cache, v_cache, cache_seqlens, *options)
    return out, lse


_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float softmax_scale"
)
_op = _library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = _library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=_backward_reference,
)
_decode_op = _library.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "bool causal, float softmax_scale) -> (Tensor, Tensor)",
    kernel=_decode_kernel,
    fake=_decode_fake,
    reference=decode_reference,
)
