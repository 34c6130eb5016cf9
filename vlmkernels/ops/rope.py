"""rope: rotary position embedding of q and k in one launch: 1-D, M-RoPE, 2-D vision, from tables.

All variants rotate pair i, the elements i and i + rotary_dim/2 of a head ("rotate-half"), and
differ only in where the angle of a pair comes from: `angle = position[axis[i]] * inv_freq[i]`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vlmkernels import _core
from vlmkernels.ops import _library


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
    head_dim = _head_dim(q)
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
    head_dim = _head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    layout, sections = "interleaved" if interleaved else "sections", list(sections)
    if len(sections) != 3 or not all(isinstance(count, int) for count in sections):
        raise ValueError(f"mrope: sections must be three ints (t, h, w), got {sections}")
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
    head_dim = _head_dim(q)
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
    head_dim = _head_dim(q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if inplace:
        _check_no_gradient(q, k)
        _rope_from_tables_(q, k, cos, sin, rotary_dim)
        return q, k
    return _rope_from_tables(q, k, cos, sin, rotary_dim, False)  # type: ignore[no-any-return]


def _head_dim(q: Tensor) -> int:
    if not isinstance(q, Tensor):
        raise TypeError(f"rope: q must be a torch.Tensor, got {type(q).__name__}")
    if q.ndim < 3:
        shape = "(num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim)"
        raise ValueError(f"rope: q must have shape {shape}, got {tuple(q.shape)}")
    return q.shape[-1]


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


def _check_no_gradient(q: Tensor, k: Tensor) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k)):
        raise ValueError(
            "rope: inplace=True has no gradient, expected q and k that do not require one "
            "(or torch.no_grad()), got requires_grad=True"
        )


@functools.lru_cache(maxsize=64)
def _frequencies(
    theta: float, rotary_dim: int, sections: tuple[int, ...], layout: str
) -> tuple[list[float], list[int]]:
    """inv_freq, a float32 value, and axis of each of the rotary_dim/2 pairs.

    inv_freq is computed by the very expression of transformers: at position 10^6 one last bit of it
    is an angle of 0.06. No tensors: one made under a FakeTensorMode would stay in the cache.
    """
    pairs = rotary_dim // 2
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"rope: theta must be finite and above 0, got {theta}")
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > 256:
        raise ValueError(f"rope: rotary_dim must be even and in 2..256, got {rotary_dim}")
    if len(sections) not in ((3,) if layout == "interleaved" else (1, 2, 3)):
        raise ValueError(f"rope: sections must be of three axes at most, got {list(sections)}")
    if sum(sections) != pairs or min(sections) < 0:
        need = f"must be non-negative and sum to rotary_dim/2 = {pairs}"
        raise ValueError(f"rope: sections {need}, got {list(sections)}")
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    if layout == "interleaved":
        axes = [i % 3 if i < 3 * (0, *sections[1:])[i % 3] else 0 for i in range(pairs)]
        if [axes.count(axis) for axis in range(3)] != list(sections):
            raise ValueError(f"rope: sections {list(sections)} cannot be interleaved")
    dim = rotary_dim // 2 if layout == "axial" else rotary_dim
    with _disable_current_modes():
        powers = theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
        inv_freq = (1.0 / powers).tolist()
    return inv_freq * (len(sections) if layout == "axial" else 1), axes


@functools.lru_cache(maxsize=64)
def _frequencies_of_core(
    theta: float, rotary_dim: int, sections: tuple[int, ...], layout: str
) -> tuple[Tensor, Tensor]:
    """`_frequencies` as the core takes them: float32 and int64 tensors on the CPU."""
    inv_freq, axis = _frequencies(theta, rotary_dim, sections, layout)
    with _disable_current_modes(), torch.inference_mode(False):
        return (
            torch.tensor(inv_freq, dtype=torch.float32, device="cpu"),
            torch.tensor(axis, dtype=torch.int64, device="cpu"),
        )


def _angles(
    position_ids: Tensor, theta: float, rotary_dim: int, sections: Sequence[int], layout: str
) -> Tensor:
    """(..., rotary_dim/2) float32."""
    inv_freq, axis = _frequencies(theta, rotary_dim, tuple(sections), layout)
    positions = position_ids.unsqueeze(0) if len(sections) == 1 else position_ids
    device = positions.device
    by_pair = positions.float()[torch.tensor(axis, device=device)].movedim(0, -1)
    return by_pair * torch.tensor(inv_freq, dtype=torch.float32, device=device)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    pairs = cos.shape[-1]
    a, b, rest = x.to(compute).split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


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
    angles = _angles(position_ids, theta, rotary_dim, sections, layout)
    angles = angles.to(torch.promote_types(q.dtype, torch.float32))
    sin = -angles.sin() if inverse else angles.sin()
    return _rotate_pairs(q, angles.cos(), sin), _rotate_pairs(k, angles.cos(), sin)


def reference_from_tables(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., : rotary_dim // 2].detach(), sin[..., : rotary_dim // 2].detach()
    sin = -sin if inverse else sin
    return _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)


def _reference_(*args: Any) -> None:
    _copy_to(args[:2], reference(*(*args, False)))


def _reference_from_tables_(*args: Any) -> None:
    _copy_to(args[:2], reference_from_tables(*(*args, False)))


def _copy_to(outputs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for output, value in zip(outputs, values, strict=True):
        output.copy_(value)


def _run(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, *args: Any) -> bool:
    position_ids, theta, rotary_dim, sections, layout, inverse = args
    inv_freq, axis = _frequencies_of_core(theta, rotary_dim, tuple(sections), layout)
    return _core.C.rope(  # type: ignore[no-any-return]
        q, k, position_ids, q_out, k_out, inv_freq, axis, len(sections), inverse
    )


def _run_from_tables(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, *args: Any) -> bool:
    cos, sin, rotary_dim, inverse = args
    return _core.C.rope_from_tables(  # type: ignore[no-any-return]
        q, k, cos, sin, q_out, k_out, rotary_dim, inverse
    )


def _kernel(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty(q), _empty(k)
    return (q_out, k_out) if _run(q, k, q_out, k_out, *args) else reference(q, k, *args)


def _kernel_from_tables(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty(q), _empty(k)
    if _run_from_tables(q, k, q_out, k_out, *args):
        return q_out, k_out
    return reference_from_tables(q, k, *args)


def _kernel_(q: Tensor, k: Tensor, *args: Any) -> None:
    if _run(q, k, q, k, *args, False):
        torch.autograd.graph.increment_version((q, k))
    else:
        _reference_(q, k, *args)


def _kernel_from_tables_(q: Tensor, k: Tensor, *args: Any) -> None:
    if _run_from_tables(q, k, q, k, *args, False):
        torch.autograd.graph.increment_version((q, k))
    else:
        _reference_from_tables_(q, k, *args)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), _empty(k)


def _fake_(q: Tensor, k: Tensor, *args: Any) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.options = inputs[3:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    *options, inverse = ctx.options
    dq, dk = _rope(_heads(dq), _heads(dk), *ctx.saved_tensors, *options, not inverse)
    return (dq, dk, *[None] * 6)


def _setup_context_from_tables(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.options = inputs[4:]


def _backward_from_tables(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    rotary_dim, inverse = ctx.options
    dq, dk = _rope_from_tables(_heads(dq), _heads(dk), *ctx.saved_tensors, rotary_dim, not inverse)
    return (dq, dk, *[None] * 4)


def _heads(x: Tensor) -> Tensor:
    """x with contiguous heads: the gradient of a sum has stride 0."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
