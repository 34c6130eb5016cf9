"""ring_attention: attention over a sequence whose tokens are spread over ranks."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels.ops import _library

from .block import accumulate_dtype
from .plan import ContextPlan, plan_of


@_library.public
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale q k^T + mask) v over the tokens of all ranks.

    q, k and v hold this rank's tokens (`plan.shard`), and so does out. The mask is the plan's. Sums
    over ranks are in float32 and rounded once, so that the error does not depend on the number of
    ranks. The gradient is deterministic. All ranks must call; a rank that does not come ends the
    others with an error after the time-out of the process group.

    Args:
        q: (batch, tokens, num_heads, head_dim), or packed (tokens, num_heads, head_dim).
        k, v: (batch, tokens, num_heads_k, head_dim), or packed; num_heads_k divides num_heads.
        plan: the same on all ranks.
        softmax_scale: 1 / sqrt(head_dim) by default.
        return_lse: return (out, lse), lse float32 (batch, num_heads, tokens), packed (num_heads,
            tokens), differentiable.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit the plan, or differ between ranks.
        RuntimeError: a rank was lost; names hop and peer.

    Source: Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889).
    """
    packed = q.ndim == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
    q, k, v = _library.autocast(q, k, v)
    scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _op(q, k, v, plan.handle, scale)
    if packed:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _kernel(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # sums are in float32
        return plan_of(handle).forward(q, k, v, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q))
    return q.new_empty(q.shape), lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, handle)
    ctx.plan = plan_of(handle) if type(handle) is Tensor else None  # keeps it alive
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, handle = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *_backward_op(dout, dlse, q, k, v, out, lse, handle, ctx.scale), None, None


def _backward_kernel(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    handle: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = (out.to(lse.dtype) * dout).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse
    with torch.autocast(q.device.type, enabled=False):
        gradients = plan_of(handle).backward(dout, q, k, v, lse, delta, scale)
    # Apart from each other: float32 ones may be views of one buffer.
    dq, dk, dv = (dx.to(q.dtype, copy=True).contiguous() for dx in gradients)
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = _library.define(
    "ring_attention(Tensor q, Tensor k, Tensor v, Tensor plan, float softmax_scale) "
    "-> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=_kernel,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = _library.define(
    "ring_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor plan, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    reference=_backward_kernel,
)
