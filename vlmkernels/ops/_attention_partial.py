"""attention_partial: attention over some of the keys, as a part of a larger softmax."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops._attention_reference import empty_lse, lse_dtype, reference
from vlmkernels.ops.attention import (
    OPTIONS,
    TokenIds,
    aligned,
    arguments,
    expect_heads,
    for_core,
)


@_library.public
def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    segment_ids: TokenIds = None,
    image_ids: TokenIds = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` with out in float32, whatever the dtype of q: (out, lse), without gradient.

    Parts over disjoint keys combine to the whole without any loss to rounding:
    lse = log sum_i exp(lse_i),  out = sum_i exp(lse_i - lse) out_i.

    Args, Raises: as `attention`, and
        key_spans: int32 (batch, seqlen_q, 2), packed (num_tokens_q, 2): query i sees the keys from
            key_spans[i, 0] to before key_spans[i, 1], in place of any other mask.

    Returns:
        out float32 (float64 for float64), shaped as q; lse as that of `attention`.

    Source: Ring Attention (arXiv 2310.01889).
    """
    masks, options = arguments(
        q, k, None, cu_seqlens_q, cu_seqlens_k, segment_ids, image_ids, max_seqlen_q, max_seqlen_k,
        causal, window_size, softmax_scale, softcap, key_spans,
    )  # fmt: skip
    return _op(q, k, v, *masks, *options)  # type: ignore[no-any-return]


@_library.public
def attention_partial_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    segment_ids: TokenIds = None,
    image_ids: TokenIds = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of these keys in float32: p = exp(s - lse), ds = p (dout v^T - delta).

    dq is a part of the sum over all keys; dk and dv are complete for these queries.

    Args:
        dout: gradient of the whole out, as q.
        q, k, v, and all options: as they were given to `attention_partial`.
        lse: of the whole softmax, float32 (float64 for float64), shaped as that of `attention`.
        delta: as lse: rowsum(out dout) of the whole out, minus the gradient of lse if it has one.

    Returns:
        dq, dk, dv, float32 (float64 for float64), shaped as q, k, v.

    Raises: as `attention`.
    """
    masks, options = arguments(
        q, k, None, cu_seqlens_q, cu_seqlens_k, segment_ids, image_ids, max_seqlen_q, max_seqlen_k,
        causal, window_size, softmax_scale, softcap, key_spans,
    )  # fmt: skip
    return _backward_op(dout, q, k, v, lse, delta, *masks, *options)  # type: ignore[no-any-return]


def _reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(q)
    return reference(q.to(dtype), k.to(dtype), v.to(dtype), *rest)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _library.empty(q, dtype=lse_dtype(q)), empty_lse(q)


def _kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    expect_heads(q)
    out, lse = _fake(q)
    if not _core.C.attention(q, k, v, out, lse, *for_core(q, k, *rest)):
        return _reference(q, k, v, *rest)
    return out, lse


def _backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # By the gradient of the part alone: with w = exp(lse_part - lse) its dout is w dout, and
    # w (rowsum(out_part dout) - delta) comes through lse_part.
    q, k, v, dout = (x.to(lse_dtype(q)) for x in (q, k, v, dout))
    out, lse_part = reference(q, k, v, *rest)
    weight = torch.exp(lse_part - lse).masked_fill(lse == -torch.inf, 0)
    by_token = weight.transpose(-1, -2)[..., None]
    dlse = weight * ((out * dout).sum(-1).transpose(-1, -2) - delta)
    dq, dk, dv = _library.reference_gradients(
        lambda q, k, v: reference(q, k, v, *rest), (q, k, v), (by_token * dout, dlse)
    )
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse_dtype(q)
    dq, dk, dv = (_library.empty(x, dtype=dtype) for x in (q, k, v))
    return dq, dk, dv


def _backward_kernel(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dout, lse, delta = aligned(dout), lse.contiguous(), delta.contiguous()
    gradients = _backward_fake(dout, q, k, v)
    workspace = lse.new_empty(2 * lse.numel())
    tensors = (dout, None, q, k, v, None, lse, delta, workspace, *gradients, None)
    if not _core.C.attention_backward(*tensors, *for_core(q, k, *rest)):
        return _backward_reference(dout, q, k, v, lse, delta, *rest)
    return gradients


_op = _library.define(
    f"attention_partial(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=_reference,
)
_backward_op = _library.define(
    "attention_partial_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, "
    f"Tensor delta, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=_backward_reference,
)
