"""rope: rotary position embedding of q and k in one launch: 1-D, M-RoPE, 2-D vision, from tables.

All variants rotate pair i, the elements i and i + rotary_dim/2 of a head ("rotate-half"), and
differ only in where the angle of a pair comes from: `angle = position[axis[i]] * inv_freq[i]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library, _rotation
from vlmkernels.ops._library import empty
from vlmkernels.ops._rotation import frequencies_of_core, heads


@_library.public
def rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """out[i], out[i+r] = x[i] cos(a) - x[i+r] sin(a), x[i+r] cos(a) + x[i] sin(a), for each head,
    with r = rotary_dim/2, a = position * theta^(-i/r); elements beyond rotary_dim are copied.

    Args:
        q: (num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim), floating
            point, head_dim contiguous, other strides free (a slice of a fused qkv will do).
        k: as q, with its own number of heads.
        position_ids: int32 or int64 (num_tokens,), or (batch, seqlen), or (1, seqlen) for all rows.
        theta: base of the frequencies; finite and above 0.
        rotary_dim: how much of head_dim is rotated; even, at most 256; None: all.
        inplace: write into q and k, which must not overlap, and return them; has no gradient.

    Returns:
        The rotated q and k: new contiguous tensors, unless inplace. Angles are fp32, as
        transformers computes them; cos, sin and the rotation are fp32 and rounded once. The
        gradient is the inverse rotation.

    Raises:
        ValueError: wrong shapes, strides, theta or rotary_dim; inplace where a gradient is needed
            or where memory is shared.
        TypeError: wrong dtypes or devices.

    RoFormer (arXiv 2104.09864), in the layout of transformers' `apply_rotary_pos_emb`.
    """
    head_dim = _rotation.head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    return _rotate(q, k, position_ids, theta, rotary_dim, [rotary_dim // 2], "sections", inplace)


@_library.public
def mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    theta: float = 1e6,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope` whose pair i takes its position from one of three axes: time, height, width.

    sections (t, h, w), with t + h + w = rotary_dim/2, says how many pairs each axis has: the first
    t pairs take time, the next h height, the rest width (Qwen2-VL: [16, 24, 24]); interleaved
    (Qwen3-VL: [24, 20, 20]) pairs 1, 4, 7, ... take height, 2, 5, 8, ... width, the others time.

    Args:
        position_ids: int32 or int64 (3, num_tokens), or (3, batch, seqlen), or (3, 1, seqlen).
        q, k, theta, rotary_dim, inplace: as in `rope`, which also says what is returned and raised.
    """
    head_dim = _rotation.head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    layout, sections = "interleaved" if interleaved else "sections", list(sections)
    _rotation.check_sections(sections)
    return _rotate(q, k, position_ids, theta, rotary_dim, sections, layout, inplace)


@_library.public
def vision_rope(
    q: Tensor, k: Tensor, position_ids: Tensor, *, theta: float = 10000.0, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` by two axes, for patches of an image: the first head_dim/4 pairs rotate by the row of
    the patch, the others by its column, both by theta^(-4i/head_dim), i = 0 ... head_dim/4 - 1.

    Args:
        position_ids: int32 or int64 (2, num_tokens) or (2, batch, seqlen): rows h and w.
        q, k, theta, inplace: as in `rope`; head_dim is a multiple of 4.

    Equal to transformers' `Qwen2VLVisionRotaryEmbedding` + `apply_rotary_pos_emb_vision`.
    """
    head_dim = _rotation.head_dim(q)
    sections = [head_dim // 4, head_dim // 4]
    return _rotate(q, k, position_ids, theta, head_dim, sections, "axial", inplace)


@_library.public
def rope_from_tables(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope` with cos(a) and sin(a) given, as transformers' rotary modules return them.

    Args:
        cos, sin: (num_tokens, width), or (batch, seqlen, width), or (1, seqlen, width); float32 or
            of q's dtype. width is rotary_dim (the second half repeats the first and is not read)
            or rotary_dim/2. They get no gradient.
        rotary_dim: None: head_dim. A partial rotary embedding must give it.
        q, k, inplace: as in `rope`, which also says what is returned and raised.
    """
    head_dim = _rotation.head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if inplace:
        _check_no_gradient(q, k)
        _rope_from_tables_(q, k, cos, sin, rotary_dim)
        return q, k
    return _rope_from_tables(q, k, cos, sin, rotary_dim, False)  # type: ignore[no-any-return]


@_library.public
def vision_rope_qkv(
    qkv: Tensor, position_ids: Tensor, *, theta: float = 10000.0, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`vision_rope` of the q and k of a fused projection: q, k, v = rotated, rotated, as they are.

    The gradient of qkv is written as one tensor, where slices of qkv would be rotated, stacked and
    copied.

    Args:
        qkv: (num_tokens, 3, num_heads, head_dim) or (batch, seqlen, 3, num_heads, head_dim),
            head_dim contiguous, other strides free.
        inplace: rotate within qkv, which must not overlap itself; has no gradient.
        position_ids, theta: as in `vision_rope`, which also says what is raised.

    Returns:
        q, k, v: (..., num_heads, head_dim). v is a view of qkv (a copy under torch.compile), q and
        k are new contiguous tensors or, inplace, views of qkv as well.
    """
    head_dim = qkv.shape[-1]
    options = (theta, head_dim, [head_dim // 4, head_dim // 4], "axial")
    if not inplace:
        return _rope_qkv(qkv, position_ids, *options)  # type: ignore[no-any-return]
    _check_no_gradient(qkv)
    _rope_qkv_(qkv, position_ids, *options)
    return qkv.unbind(-3)  # type: ignore[return-value]


def _rotate(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    theta: float,
    rotary_dim: int,
    sections: list[int],
    layout: str,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    if inplace:
        _check_no_gradient(q, k)
        _rope_(q, k, position_ids, theta, rotary_dim, sections, layout)
        return q, k
    return _rope(q, k, position_ids, theta, rotary_dim, sections, layout, False)  # type: ignore[no-any-return]


def _check_no_gradient(*inputs: Tensor) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise ValueError(
            "rope: inplace=True has no gradient, expected q and k that do not require one "
            "(or torch.no_grad()), got requires_grad=True"
        )


def reference(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    theta: float,
    rotary_dim: int,
    sections: Sequence[int],
    layout: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    angles = _rotation.angles(position_ids, theta, rotary_dim, sections, layout)
    angles = angles.to(torch.promote_types(q.dtype, torch.float32))
    sin = -angles.sin() if inverse else angles.sin()
    cos = angles.cos()
    return _rotation.rotate_pairs(q, cos, sin), _rotation.rotate_pairs(k, cos, sin)


def reference_from_tables(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., : rotary_dim // 2].detach(), sin[..., : rotary_dim // 2].detach()
    sin = -sin if inverse else sin
    return _rotation.rotate_pairs(q, cos, sin), _rotation.rotate_pairs(k, cos, sin)


def reference_qkv(
    qkv: Tensor, position_ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    return *reference(q, k, position_ids, *(*options, False)), v.clone()


def reference_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, position_ids: Tensor, *options: Any
) -> Tensor:
    return torch.stack([*reference(dq, dk, position_ids, *(*options, True)), dv], dim=-3)


def _reference_(*args: Any) -> None:
    _copy_to(args[:2], reference(*(*args, False)))


def _reference_qkv_(qkv: Tensor, *args: Any) -> None:
    _copy_to(qkv.unbind(-3), reference_qkv(qkv, *args))


def _reference_from_tables_(*args: Any) -> None:
    _copy_to(args[:2], reference_from_tables(*(*args, False)))


def _copy_to(outputs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for output, value in zip(outputs, values, strict=True):
        output.copy_(value)


def _run_from_tables(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, *args: Any) -> bool:
    cos, sin, rotary_dim, inverse = args
    return _core.C.rope_from_tables(  # type: ignore[no-any-return]
        q, k, cos, sin, q_out, k_out, rotary_dim, inverse
    )


def _kernel(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    theta: float,
    rotary_dim: int,
    sections: Sequence[int],
    layout: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    inv_freq, axis = frequencies_of_core(theta, rotary_dim, tuple(sections), layout)
    q_out, k_out = empty(q), empty(k)
    num_axes = len(sections)
    if _core.C.rope(q, k, position_ids, q_out, k_out, inv_freq, axis, num_axes, inverse):
        return q_out, k_out
    return reference(q, k, position_ids, theta, rotary_dim, sections, layout, inverse)


def _kernel_from_tables(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty(q), empty(k)
    if _run_from_tables(q, k, q_out, k_out, *args):
        return q_out, k_out
    return reference_from_tables(q, k, *args)


def _kernel_(q: Tensor, k: Tensor, position_ids: Tensor, *options: Any) -> None:
    if _core.C.rope(q, k, position_ids, q, k, *_of_core(options), False):
        torch.autograd.graph.increment_version((q, k))
    else:
        _reference_(q, k, position_ids, *options)


def _kernel_from_tables_(q: Tensor, k: Tensor, *args: Any) -> None:
    if _run_from_tables(q, k, q, k, *args, False):
        torch.autograd.graph.increment_version((q, k))
    else:
        _reference_from_tables_(q, k, *args)


def _of_core(options: tuple[Any, ...]) -> tuple[Tensor, Tensor, int]:
    theta, rotary_dim, sections, layout = options
    return *frequencies_of_core(theta, rotary_dim, tuple(sections), layout), len(sections)


def _kernel_qkv_viewing(
    qkv: Tensor, position_ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q = qkv.new_empty((*qkv.shape[:-3], *qkv.shape[-2:]))
    k = empty(q)
    if _core.C.rope_qkv(qkv, position_ids, q, k, *_of_core(options)):
        return q, k, qkv.select(-3, 2)
    return reference_qkv(qkv, position_ids, *options)


def _kernel_qkv(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _kernel_qkv_viewing(qkv, *args)
    return q, k, v.clone(memory_format=torch.contiguous_format)


def _kernel_qkv_(qkv: Tensor, position_ids: Tensor, *options: Any) -> None:
    if _core.C.rope_qkv(qkv, position_ids, None, None, *_of_core(options)):
        torch.autograd.graph.increment_version(qkv)
    else:
        _reference_qkv_(qkv, position_ids, *options)


def _kernel_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, position_ids: Tensor, *options: Any
) -> Tensor:
    dqkv = _fake_qkv_backward(dq)
    if _core.C.rope_qkv_backward(dq, dk, dv, dqkv, position_ids, *_of_core(options)):
        return dqkv
    return reference_qkv_backward(dq, dk, dv, position_ids, *options)


def _fake_qkv(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:-3], *qkv.shape[-2:])
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


def _fake_qkv_backward(dq: Tensor, *args: Any) -> Tensor:
    return dq.new_empty((*dq.shape[:-2], 3, *dq.shape[-2:]))


def _fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty(q), empty(k)


def _fake_(*args: Any) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.options = inputs[3:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    (position_ids,) = ctx.saved_tensors
    theta, rotary_dim, sections, layout, inverse = ctx.options
    options = (theta, rotary_dim, sections, layout, not inverse)
    dq, dk = _rope(heads(dq), heads(dk), position_ids, *options)
    return dq, dk, None, None, None, None, None, None


def _setup_context_qkv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.options = inputs[2:]


def _backward_qkv(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    grads = heads(dq), heads(dk), heads(dv)
    return (_rope_qkv_backward(*grads, *ctx.saved_tensors, *ctx.options), *[None] * 5)


def _setup_context_from_tables(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.options = inputs[4:]


def _backward_from_tables(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    rotary_dim, inverse = ctx.options
    grads = heads(dq), heads(dk)
    dq, dk = _rope_from_tables(*grads, *ctx.saved_tensors, rotary_dim, not inverse)
    return (dq, dk, *[None] * 4)


_rope = _library.define(
    "rope(Tensor q, Tensor k, Tensor position_ids, float theta, int rotary_dim, int[] sections, "
    "str layout, bool inverse) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_rope_ = _library.define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, float theta, int rotary_dim, "
    "int[] sections, str layout) -> ()",
    kernel=_kernel_,
    fake=_fake_,
    reference=_reference_,
)
_rope_from_tables = _library.define(
    "rope_from_tables(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary_dim, bool inverse)"
    " -> (Tensor, Tensor)",
    kernel=_kernel_from_tables,
    fake=_fake,
    reference=reference_from_tables,
    setup_context=_setup_context_from_tables,
    backward=_backward_from_tables,
)
_rope_from_tables_ = _library.define(
    "rope_from_tables_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, int rotary_dim) -> ()",
    kernel=_kernel_from_tables_,
    fake=_fake_,
    reference=_reference_from_tables_,
)
_rope_qkv = _library.define(
    "rope_qkv(Tensor qkv, Tensor position_ids, float theta, int rotary_dim, int[] sections, "
    "str layout) -> (Tensor q, Tensor k, Tensor v)",
    kernel=_kernel_qkv,
    eager=_kernel_qkv_viewing,
    fake=_fake_qkv,
    reference=reference_qkv,
    setup_context=_setup_context_qkv,
    backward=_backward_qkv,
)
_rope_qkv_ = _library.define(
    "rope_qkv_(Tensor(a!) qkv, Tensor position_ids, float theta, int rotary_dim, int[] sections, "
    "str layout) -> ()",
    kernel=_kernel_qkv_,
    fake=_fake_,
    reference=_reference_qkv_,
)
_rope_qkv_backward = _library.define(
    "rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor position_ids, float theta, "
    "int rotary_dim, int[] sections, str layout) -> Tensor",
    kernel=_kernel_qkv_backward,
    fake=_fake_qkv_backward,
    reference=reference_qkv_backward,
)
