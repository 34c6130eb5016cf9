"""qk_norm_rope: RMSNorm of every head of q and k, then rotary embedding, in one pass (Qwen3-VL)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library, _rotation
from vlmkernels.ops.rope import reference as rotate
from vlmkernels.ops.rope import reference_from_tables as rotate_by_tables

# The angles of an op, its last arguments: (position_ids, theta, rotary_dim, sections, layout), or
# (cos, sin, rotary_dim).
_Angles = tuple[Any, ...]
_Four = tuple[Tensor, Tensor, Tensor, Tensor]


@_library.public
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    position_ids: Tensor,
    sections: Sequence[int] | None = None,
    *,
    interleaved: bool = False,
    theta: float = 1e6,
    rotary_dim: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """out = rotate(x / sqrt(mean(x^2) + eps) * weight) for each head x of q and of k, the mean over
    head_dim, the rotation that of `rope` or, given sections, of `mrope`.

    Args:
        q: (num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim), floating
            point, head_dim contiguous, other strides free (a slice of a fused qkv will do).
        k: as q, with its own number of heads.
        q_weight, k_weight: (head_dim,), both of q's dtype or both float32.
        position_ids: int32 or int64 (num_tokens,), (batch, seqlen) or (1, seqlen); with sections
            (3, ...) in front.
        sections, interleaved, theta, rotary_dim: as in `mrope`; no sections: as in `rope`.

    Returns:
        Normalised and rotated q and k: new contiguous tensors of q's dtype. All is fp32 in between
        and rounded once. Only the arguments are kept for the gradient, which goes to q, k and both
        weights; that of the weights is summed in a fixed order.

    Raises:
        ValueError: wrong shapes, strides, sections, theta, rotary_dim or eps.
        TypeError: wrong dtypes or devices.

    In place of q_norm, k_norm and apply_rotary_pos_emb of transformers' Qwen3VLTextAttention (and,
    without sections, Qwen3Attention).
    """
    head_dim = _rotation.head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    layout, parts = "sections", [rotary_dim // 2]
    if position_ids is None:  # to the op this is angles given by tables
        raise TypeError("qk_norm_rope: position_ids must be a torch.Tensor, got None")
    if sections is None and interleaved:
        raise ValueError("qk_norm_rope: interleaved needs sections, got None")
    if sections is not None:
        layout, parts = "interleaved" if interleaved else "sections", list(sections)
        _rotation.check_sections(parts)
    angles = (position_ids, theta, rotary_dim, parts, layout)
    return _qk_norm_rope(q, k, q_weight, k_weight, eps, *angles)  # type: ignore[no-any-return]


@_library.public
def qk_norm_rope_from_tables(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` with the cos and sin of the angles given.

    Args:
        cos, sin, rotary_dim: as in `rope_from_tables`; cos and sin get no gradient.
        q, k, q_weight, k_weight, eps: as in `qk_norm_rope`, which also says what is returned and
            raised.
    """
    rotary_dim = _rotation.head_dim(q) if rotary_dim is None else rotary_dim
    return _from_tables(q, k, q_weight, k_weight, eps, cos, sin, rotary_dim)  # type: ignore[no-any-return]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    z = x.to(compute)
    return z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(compute)


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *angles: Any
) -> tuple[Tensor, Tensor]:
    normed = _rms_norm(q, q_weight, eps), _rms_norm(k, k_weight, eps)
    by = rotate if len(angles) == 5 else rotate_by_tables
    rotated = by(*normed, *(*angles, False))
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def reference_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    weight_grad: bool,
    eps: float,
    *angles: Any,
) -> _Four:
    inputs = (q, k, q_weight, k_weight, eps, *angles)
    found = _library.reference_gradients(reference, inputs, (dq, dk))[:4]
    none = q_weight.new_empty(0)
    return tuple(  # type: ignore[return-value]
        none.clone() if x is None or (i > 1 and not weight_grad) else x.contiguous()
        for i, x in enumerate(found)
    )


def _angles_of_core(angles: _Angles) -> tuple[Any, ...]:
    if len(angles) == 3:
        cos, sin, rotary_dim = angles
        return None, None, None, 0, cos, sin, rotary_dim
    position_ids, theta, rotary_dim, sections, layout = angles
    inv_freq, axis = _rotation.frequencies_of_core(theta, rotary_dim, tuple(sections), layout)
    return position_ids, inv_freq, axis, len(sections), None, None, rotary_dim


def _kernel(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *angles: Any
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _library.empty(q), _library.empty(k)
    inputs = (q, k, q_weight, k_weight)
    if _core.C.qk_norm_rope(*inputs, q_out, k_out, eps, *_angles_of_core(angles)):
        return q_out, k_out
    return reference(*inputs, eps, *angles)


def _kernel_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    weight_grad: bool,
    eps: float,
    *angles: Any,
) -> _Four:
    inputs = (dq, dk, q, k, q_weight, k_weight)
    outputs = _fake_backward(*inputs, weight_grad, eps)
    wanted: tuple[Tensor | None, ...] = (None, None, None)
    if weight_grad:
        num_partials = _core.C.qk_norm_rope_num_partials(q)
        shape = (2, num_partials, q.shape[-1])
        wanted = (*outputs[2:], q.new_empty(shape, dtype=torch.float32))
    if _core.C.qk_norm_rope_backward(*inputs, *outputs[:2], *wanted, eps, *_angles_of_core(angles)):
        return outputs
    return reference_backward(*inputs, weight_grad, eps, *angles)


def _fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *angles: Any
) -> tuple[Tensor, Tensor]:
    return _library.empty(q), _library.empty(k)


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    weight_grad: bool,
    eps: float,
    *angles: Any,
) -> _Four:
    dq_weight = torch.empty_like(q_weight) if weight_grad else q_weight.new_empty(0)
    dk_weight = torch.empty_like(k_weight) if weight_grad else k_weight.new_empty(0)
    return _library.empty(q), _library.empty(k), dq_weight, dk_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = 5 if len(inputs) == 10 else 6  # q, k, weights, and the tensors of the angles
    heads, (ctx.eps, *angles) = inputs[:4], inputs[4:]
    ctx.save_for_backward(*heads, *angles[: tensors - 4])
    ctx.options = angles[tensors - 4 :]


def _gradients(ctx: Any, backward: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, *angles = ctx.saved_tensors
    weight_grad = any(ctx.needs_input_grad[2:4])
    heads = _rotation.heads(dq), _rotation.heads(dk), q, k, q_weight, k_weight
    dq, dk, *dweights = backward(*heads, weight_grad, ctx.eps, *angles, *ctx.options)
    rest = [None] * (1 + len(angles) + len(ctx.options))
    return (dq, dk, *(dweights if weight_grad else (None, None)), *rest)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _qk_norm_rope_backward, dq, dk)


def _backward_from_tables(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _from_tables_backward, dq, dk)


_HEADS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
_POSITIONS = (
    "float eps, Tensor position_ids, float theta, int rotary_dim, int[] sections, str layout"
)
_TABLES = "float eps, Tensor cos, Tensor sin, int rotary_dim"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"

_qk_norm_rope = _library.define(
    f"qk_norm_rope({_HEADS}{_POSITIONS}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_qk_norm_rope_backward = _library.define(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, {_HEADS}bool weight_grad, {_POSITIONS})"
    f" -> {_GRADIENTS}",
    kernel=_kernel_backward,
    fake=_fake_backward,
    reference=reference_backward,
)
_from_tables = _library.define(
    f"qk_norm_rope_from_tables({_HEADS}{_TABLES}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward_from_tables,
)
_from_tables_backward = _library.define(
    f"qk_norm_rope_from_tables_backward(Tensor dq, Tensor dk, {_HEADS}bool weight_grad, {_TABLES})"
    f" -> {_GRADIENTS}",
    kernel=_kernel_backward,
    fake=_fake_backward,
    reference=reference_backward,
)
