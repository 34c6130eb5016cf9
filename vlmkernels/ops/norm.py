"""norm: RMSNorm and LayerNorm over the last dimension, with an optional fused residual add."""

import functools
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _core
from vlmkernels.ops import _library


@_library.public
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    """y = h / sqrt(mean(h^2) + eps) * weight, with h = x or, given a residual, h = x + residual.

    Args:
        x: (..., hidden_dim), floating point; where hidden_dim is not contiguous (as behind a
            convolution) or rows do not lie at one stride, it is copied first.
        weight: (hidden_dim,), of x's dtype or float32.
        residual: as x, of its shape and dtype; its gradient is that of x.

    Returns:
        y, or (y, h) with a residual; new contiguous tensors of x's dtype. h is rounded to x's
        dtype before it is normalised; from there all is fp32 and y is rounded once (transformers
        rounds before it multiplies by the weight, and returns fp32 for an fp32 weight).

    Raises:
        ValueError: wrong shapes. TypeError: wrong dtypes or devices.

    Zhang and Sennrich, arXiv 1910.07467. Drop-in for transformers' Qwen2RMSNorm.
    """
    y, h, _ = _norm(x, residual, weight, None, eps, False)
    return y if residual is None else (y, h)


@_library.public
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Any:
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, with h = x or h = x + residual.

    Args:
        bias: (hidden_dim,), of weight's dtype, or None.
        x, weight, residual: as in `rms_norm`, which also says what is returned and raised.

    Ba et al., arXiv 1607.06450. Drop-in for torch.nn.functional.layer_norm over one dimension.
    """
    y, h, _ = _norm(x, residual, weight, bias, eps, True)
    return y if residual is None else (y, h)


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    z = h.to(compute)
    mean = z.mean(-1)
    z = z - mean.unsqueeze(-1) if centered else z
    rstd = (z.square().mean(-1) + eps).rsqrt()
    y = z * rstd.unsqueeze(-1) * weight.to(compute)
    y = (y if bias is None else y + bias.to(compute)).to(x.dtype)
    stats = torch.stack([rstd, mean] if centered else [rstd])
    return y, x.new_empty(0) if residual is None else h, stats


def reference_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(h.dtype, torch.float32)
    z, g = h.to(compute), dy.to(compute)
    rstd, centered = stats[0].unsqueeze(-1), len(stats) == 2
    xhat = (z - stats[1].unsqueeze(-1) if centered else z) * rstd
    wg = g * weight.to(compute)
    dz = wg - xhat * (wg * xhat).mean(-1, keepdim=True)
    if centered:
        dz = dz - wg.mean(-1, keepdim=True)
    dx = dz * rstd
    dx = dx if dh is None else dx + dh.to(compute)
    leading = list(range(h.ndim - 1))
    none = weight.new_empty(0)
    dweight = (g * xhat).sum(leading).to(weight.dtype) if weight_grad else none
    dbias = g.sum(leading).to(weight.dtype) if bias_grad else none.clone()
    return dx.to(h.dtype), dweight, dbias


def _run(
    with_stats: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, residual = _library.rows(x), None if residual is None else _library.rows(residual)
    y = _library.empty(x)
    h = None if residual is None else torch.empty_like(y)
    # Last: small memory asked for first would be cut from what the last y gave back.
    stats = _empty_stats(x, centered) if with_stats else None
    if not _core.C.norm(x, residual, weight, bias, y, h, stats, eps, centered):
        return reference(x, residual, weight, bias, eps, centered)
    return y, h, stats


def _kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    y, h, stats = _run(True, x, *args)
    return y, x.new_empty(0) if h is None else h, stats


def _empty_stats(x: Tensor, centered: bool) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(2 if centered else 1, *x.shape[:-1], dtype=compute)


def _kernel_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _library.rows(h)
    args = (dy, dh, h, weight, stats)
    dx, dweight, dbias = _fake_backward(*args, weight_grad, bias_grad)
    partials = None
    if weight_grad or bias_grad:
        shape = (weight_grad + bias_grad, _core.C.norm_num_partials(h), h.shape[-1])
        partials = torch.empty(shape, dtype=torch.float32, device=h.device)
    wanted = (dweight if weight_grad else None, dbias if bias_grad else None, partials)
    if not _core.C.norm_backward(*args, dx, *wanted):
        return reference_backward(*args, weight_grad, bias_grad)
    return dx, dweight, dbias


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _library.empty(x)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, h, _empty_stats(x, centered)


def _fake_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    stats: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _library.empty(h)
    dweight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    dbias = torch.empty_like(weight) if bias_grad else weight.new_empty(0)
    return dx, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _ = inputs
    _, h, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x if residual is None else h, weight, stats)
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None


def _backward(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, dstats: None
) -> tuple[Tensor | None, ...]:
    h, weight, stats = ctx.saved_tensors
    dh = dh if ctx.has_residual else None
    if dy is None:
        return dh, dh, None, None, None, None
    weight_grad, bias_grad = ctx.needs_input_grad[2], ctx.has_bias and ctx.needs_input_grad[3]
    dh = None if dh is None else dh.contiguous()
    dx, dweight, dbias = _norm_backward(
        dy.contiguous(), dh, h, weight, stats, weight_grad, bias_grad
    )
    return (
        dx,
        dx if ctx.has_residual else None,
        dweight if weight_grad else None,
        dbias if bias_grad else None,
        None,
        None,
    )


_norm = _library.define(
    "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor y, Tensor h, Tensor stats)",
    kernel=_kernel,
    eager=functools.partial(_run, True),
    inference=functools.partial(_run, False),
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
)
_norm_backward = _library.define(
    "norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor stats, "
    "bool weight_grad, bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    kernel=_kernel_backward,
    fake=_fake_backward,
    reference=reference_backward,
)
