"""attention: exact softmax attention, dense or packed, with the masks and biases of VLMs."""

import math
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops._attention_reference import empty_lse, reference

TokenIds = Tensor | tuple[Tensor, Tensor] | None


@_library.public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    bias: Tensor | None = None,
    segment_ids: TokenIds = None,
    image_ids: TokenIds = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(s) v;  lse = log sum exp(s);  s = cap(softmax_scale q k^T) + bias + mask.

    Dense, or packed when cu_seqlens_q is given: sequence b is then the tokens cu_seqlens[b] to
    cu_seqlens[b + 1], and sees itself only. Query i sees key j when

        segment[i] == segment[j]  and  (j is in the window of i  or  image[i] == image[j] >= 0)

    where the window is -left <= j - (i + seqlen_k - seqlen_q) <= right: bottom-right. So a VLM's
    text is causal and its images see all of themselves with causal=True and image_ids, also
    beyond a sliding window. Tiles in which nobody sees anybody are skipped. A query that sees no
    key gets out 0 and lse -inf, and passes no gradient. Sequences may be empty.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), packed (num_tokens_q, num_heads, head_dim);
            head_dim a multiple of 8 up to 256. Any strides with head_dim contiguous (slices of a
            fused qkv); on CUDA rows start at multiples of 16 bytes.
        k, v: (batch, seqlen_k, num_heads_k, head_dim), packed (num_tokens_k, num_heads_k,
            head_dim); num_heads_k divides num_heads (GQA, MQA).
        causal: right = 0, whatever window_size says.
        softmax_scale: positive; 1 / sqrt(head_dim) by default.
        window_size: (left, right), each -1 (unbounded) or the number of keys on that side.
        softcap: cap(s) = softcap tanh(s / softcap); 0: no cap.
        bias: (1 or batch, 1 or num_heads, seqlen_q, seqlen_k), packed by position in the sequence
            (1 or batch, 1 or num_heads, max_seqlen_q, max_seqlen_k) or longer; float32 or the
            dtype of q. Its gradient is summed over what is broadcast.
        segment_ids, image_ids: int32 (batch, seqlen), packed (num_tokens,), contiguous; a pair
            (of q, of k) where these differ. A negative image is none.
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
        float64 run through PyTorch. The gradient is deterministic, that of bias too. Under autocast
        q, k and v are cast first, as by scaled_dot_product_attention.

    Raises:
        ValueError: shapes, strides, head_dim, softmax_scale, window or lengths are not as above.
        TypeError: dtypes or devices differ, or lengths or ids are not int32.

    Source: FlashAttention-2 (arXiv 2307.08691); softcap: Gemma 2 (arXiv 2408.00118).
    """
    q, k, v = _library.autocast(q, k, v)
    masks, options = arguments(
        q, k, bias, cu_seqlens_q, cu_seqlens_k, segment_ids, image_ids, max_seqlen_q, max_seqlen_k,
        causal, window_size, softmax_scale, softcap,
    )  # fmt: skip
    out, lse = _op(q, k, v, *masks, *options)
    return (out, lse) if return_lse else out


def arguments(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    segment_ids: TokenIds,
    image_ids: TokenIds,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    key_spans: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """What the ops take after q, k and v: tensors, and numbers."""
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
    if bias is not None and bias.dtype != torch.float32:
        (bias,) = _library.autocast(bias)
    ids = (*_pair("segment_ids", segment_ids), *_pair("image_ids", image_ids))
    lengths, sides = (max_seqlen_q, max_seqlen_k), window(causal, window_size)
    masks = (bias, cu_seqlens_q, cu_seqlens_k, *ids, key_spans)
    return masks, (*lengths, *sides, scale(q, softmax_scale), softcap)


def scale(q: Tensor, softmax_scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale


def window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    left, right = window_size
    return left, 0 if causal else right


def _pair(name: str, ids: TokenIds) -> tuple[Tensor | None, Tensor | None]:
    if ids is None or isinstance(ids, Tensor):
        return ids, ids
    if not isinstance(ids, (tuple, list)) or len(ids) != 2:
        raise TypeError(
            f"attention: {name} must be a torch.Tensor or a pair (of q, of k) of them, got "
            f"{type(ids).__name__}"
        )
    return ids[0], ids[1]


def _max_seqlen(cu_seqlens: Tensor, tokens: Tensor) -> int:
    if torch.compiler.is_compiling() or cu_seqlens.device.type == "meta":
        return tokens.shape[0]
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        return 0  # the core says what is wrong with it
    return int(cu_seqlens.diff().max())


def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _library.empty(q), empty_lse(q)


def _kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    expect_heads(q)
    out, lse = fake(q, k, v)
    if not _core.C.attention(q, k, v, out, lse, *for_core(q, k, *rest)):
        return reference(q, k, v, *rest)
    return out, lse


def expect_heads(q: Tensor) -> None:
    if q.dim() < 3:  # no lse shape: let the core say what is wrong
        raise ValueError(
            "attention: q must have shape (batch, seqlen, num_heads, head_dim) or "
            f"(num_tokens, num_heads, head_dim), got {tuple(q.shape)}"
        )


def for_core(q: Tensor, k: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The arguments after q, k, v as the core takes them: the tensors as one tuple, with
    workspaces for the range of ids of each 64 tokens and for the tiles of packed sequences."""
    ranges = tiles = None
    if any(rest[i] is not None for i in (2, 4, 6)):
        blocks = sum(-(-math.prod(x.shape[:-2]) // 64) for x in (q, k))
        ranges = q.new_empty((blocks, 4), dtype=torch.int32)
    if rest[0] is not None and q.ndim == 3:
        slots = max(len(q), len(k)) // 64 + rest[0].numel() - 1
        tiles = q.new_empty((1 + max(slots, 0), 2), dtype=torch.int32)
    if bias is not None and bias.ndim and bias.stride(-1) != 1:
        bias = bias.contiguous()
    return (ranges, tiles, bias, *rest[:7]), *rest[7:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *rest[:8])
    ctx.options = rest[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *masks = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    with_dbias = masks[0] is not None and ctx.needs_input_grad[3]
    *gradients, dbias = _backward_op(
        dout, dlse, q, k, v, out, lse, with_dbias, *masks, *ctx.options
    )
    return *gradients, dbias if with_dbias else None, *(None for _ in range(13))


def _backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    with_dbias: bool, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (q, k, v, bias)
    found = _library.reference_gradients(
        lambda q, k, v, bias: reference(q, k, v, bias, *rest), inputs, (dout, dlse)
    )
    gradients = [
        torch.zeros_like(x) if dx is None else dx
        for x, dx in zip(inputs, found, strict=True)
        if x is not None
    ]
    if not with_dbias:
        gradients[3:] = [q.new_empty(0)]
    dq, dk, dv, dbias = gradients
    return dq, dk, dv, dbias


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    with_dbias: bool, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = _library.empty(bias) if bias is not None and with_dbias else q.new_empty(0)
    return _library.empty(q), _library.empty(k), _library.empty(v), dbias


def _backward_kernel(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    with_dbias: bool, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, dlse = aligned(dout), None if dlse is None else dlse.contiguous()
    *gradients, dbias = _backward_fake(dout, dlse, q, k, v, out, lse, with_dbias, *rest)
    workspace = lse.new_empty(2 * lse.numel())
    tensors = (dout, dlse, q, k, v, out, lse, None, workspace, *gradients)
    if not _core.C.attention_backward(
        *tensors, dbias if with_dbias else None, *for_core(q, k, *rest)
    ):
        return _backward_reference(dout, dlse, q, k, v, out, lse, with_dbias, *rest)
    dq, dk, dv = gradients
    return dq, dk, dv, dbias


def aligned(dout: Tensor) -> Tensor:
    """Contiguous; a view at an odd offset is copied, as nobody could align it for the kernel."""
    dout = dout.contiguous()
    return dout.clone() if dout.data_ptr() % 16 else dout


OPTIONS = (
    "Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? segments_q, "
    "Tensor? segments_k, Tensor? images_q, Tensor? images_k, Tensor? key_spans, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int window_left, int window_right, "
    "float softmax_scale, float softcap"
)
_op = _library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = _library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, bool with_dbias, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=_backward_reference,
)
