"""contrastive_loss: the losses of CLIP and SigLIP without the batch x batch matrix of logits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlmkernels import _core
from vlmkernels.ops import _library
from vlmkernels.ops._contrastive_chunks import (
    chunk_rows,
    clip_chunks,
    gradient_chunks,
    products_for,
    siglip_chunks,
)

# Rows of logits whose partial results (forward) or gradients (backward) the CUDA kernels keep at a
# time: memory is linear in the batch.
FORWARD_ROWS, BACKWARD_ROWS = 8192, 4096


@_library.public
def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """loss = mean_i(logsumexp_j(s_ij) + logsumexp_j(s_ji)) / 2 - mean_i(s_ii),
    s_ij = logit_scale * image_i · text_j

    InfoNCE in both directions: the mean of the cross-entropies by rows and by columns, from one
    sweep over s, of which no more than a panel is ever in memory. Under autocast the features are
    cast as those of a matrix product.

    Args:
        image_features, text_features: (batch, dim), normalised by the caller; fp16, bf16, fp32 or
            fp64. Pair (i, i) is positive.
        logit_scale: one value, as it multiplies: open_clip's `logit_scale.exp()`. A tensor gets a
            gradient and is not checked (that would wait for the GPU): a NaN in it is one in the
            loss.

    Returns:
        A scalar, fp32 (fp64 for fp64 features): statistics are not rounded to the features' dtype.
        NaN, the mean of nothing, for an empty batch.

    Raises:
        ValueError: features of different shapes, a logit_scale of more than one value or, as a
            float, not finite. TypeError: dtypes or devices that differ or are no floats.

    Radford et al., arXiv 2103.00020, figure 3; two statistics in one sweep as in no paper we know.
    """
    scale = _scalar("clip_loss: logit_scale", logit_scale, image_features)
    loss, *_ = _clip_op(*_library.autocast(image_features, text_features), scale)
    return loss  # type: ignore[no-any-return]


@_library.public
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """loss = -sum_ij log(sigmoid(z_ij s_ij)) / batch, z_ii = 1, z_ij = -1 for i != j,
    s_ij = logit_scale * image_i · text_j + logit_bias

    Args:
        logit_bias: one value; None: 0.
        image_features, text_features, logit_scale: as in `clip_loss`, which also says what is
            returned and raised.

    Zhai et al., arXiv 2303.15343, equation 1.
    """
    scale = _scalar("siglip_loss: logit_scale", logit_scale, image_features)
    bias = None
    if logit_bias is not None:
        bias = _scalar("siglip_loss: logit_bias", logit_bias, image_features)
    loss, _ = _siglip_op(*_library.autocast(image_features, text_features), scale, bias)
    return loss  # type: ignore[no-any-return]


def reference(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    logits = _logits(image, text, scale, None)
    whole = (logits.logsumexp(1), logits.logsumexp(0))
    image_lse, text_lse = (torch.stack((x, torch.zeros_like(x))) for x in whole)
    loss = mean_loss(image_lse, text_lse, logits.diagonal())
    return loss, image_lse, text_lse, image.new_empty(0)


def siglip_reference(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = _logits(image, text, scale, bias)
    return (-logsigmoid(-logits).sum(1) - logits.diagonal()).mean(), image.new_empty(0)


def _logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = image.to(scale.dtype) @ text.to(scale.dtype).t() * scale
    return logits if bias is None else logits + bias


def _scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one value, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        return value.to(like.device, dtype).reshape(())
    if not isinstance(value, float | int):
        raise TypeError(f"{name} must be a tensor or a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return like.new_full((), value, dtype=dtype)


def statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    positives: bool = True,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block of logits: log-sum-exp of each row, of each column, and the positives' logits.

    A log-sum-exp is (2, n): the largest logit, and log(sum(exp(s - largest))). As one fp32 number
    it would be rounded to the digits of the largest logit, and so would every probability.

    positives: pair (i, i) is positive; otherwise no pair of the block is, and the third is empty.
    products: from `products_for`; filled.
    """
    image, text = image.contiguous(), text.contiguous()
    image_lse, text_lse = _lse_of(image, scale), _lse_of(text, scale)
    positive = _vector(image, scale) if positives else None
    outputs = (image_lse, text_lse, positive, None)
    if not _forward(image, text, scale, None, positives, outputs):
        clip_chunks(image, text, scale, image_lse, text_lse, positive, products)
    return image_lse, text_lse, image_lse.new_empty(0) if positive is None else positive


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The log-sum-exp, (2, n), of two disjoint parts of the same rows."""
    high = torch.maximum(a[0], b[0])
    return torch.stack((high, torch.logaddexp(a[0] - high + a[1], b[0] - high + b[1])))


def mean_loss(image_lse: Tensor, text_lse: Tensor, positive: Tensor) -> Tensor:
    """mean(image_lse + text_lse) / 2 - mean(positive), the large numbers subtracted first."""
    by_image, by_text = (lse[0] - positive + lse[1] for lse in (image_lse, text_lse))
    return (by_image + by_text).mean() / 2


def losses(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    positives: bool = True,
    products: Tensor | None = None,
) -> Tensor:
    """Of a block of logits: the sum over each row of softplus(-z s). products: filled."""
    image, text = image.contiguous(), text.contiguous()
    sums = _vector(image, scale)
    if not _forward(image, text, scale, bias, positives, (None, None, None, sums)):
        siglip_chunks(image, text, scale, bias, sums, positives, products)
    return sums


def _vector(features: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(features.shape[:1])


def _lse_of(features: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((2, *features.shape[:1]))


def _forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    positives: bool,
    outputs: tuple[Tensor | None, ...],
) -> bool:
    """Checks the arguments and runs the CUDA kernel where there is one."""
    workspace, rows = None, min(len(image), FORWARD_ROWS)
    if _has_cuda_kernel(image, text):
        workspace = scale.new_empty(_core.C.contrastive_workspace(rows, len(text)))
    return bool(
        _core.C.contrastive_forward(image, text, scale, bias, positives, *outputs, workspace, rows)
    )


def _has_cuda_kernel(image: Tensor, text: Tensor) -> bool:
    half = image.dtype in (torch.float16, torch.bfloat16)
    return bool(half and image.numel() and text.numel() and _core.C.takes_cuda(image))


def _clip_kernel(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    products = products_for(image, text)
    loss, image_lse, text_lse = _clip(image, text, scale, products)
    return loss, image_lse, text_lse, image.new_empty(0) if products is None else products


def _clip_inference(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return _clip(image, text, scale, None)


def _clip(
    image: Tensor, text: Tensor, scale: Tensor, products: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    image_lse, text_lse, positive = statistics(image, text, scale, products=products)
    return mean_loss(image_lse, text_lse, positive), image_lse, text_lse


def _clip_fake(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    lse = _lse_of(image, scale), _lse_of(text, scale)
    products = products_for(image, text)
    return torch.empty_like(scale), *lse, image.new_empty(0) if products is None else products


def _siglip_kernel(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    products = products_for(image, text)
    loss = losses(image, text, scale, bias, products=products).mean()
    return loss, image.new_empty(0) if products is None else products


def _siglip_inference(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, None]:
    return losses(image, text, scale, bias).mean(), None


def _siglip_fake(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    products = products_for(image, text)
    return torch.empty_like(scale), image.new_empty(0) if products is None else products


def gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_lse: Tensor | None,
    text_lse: Tensor | None,
    factor: Tensor,
    positives: bool,
    weights: list[float],
    image_grad: bool,
    text_grad: bool,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block of logits, with ds_ij = w_0 (p_row - positive) + w_1 (p_column - positive) given
    log-sum-exps, sigmoid(s) - positive without them (products: those kept by the forward):

    image_lse, text_lse: as `statistics` gives them.

    Returns:
        factor * scale * ds text, factor * scale * ds^T image (empty where not wanted; fp32, or fp64
        for fp64 features; with products in the features' dtype, unless it is a sum of several
        products), and [sum of ds * image · text, sum of ds].
    """
    image, text = image.contiguous(), text.contiguous()
    args = (image, text, scale, bias, image_lse, text_lse, factor, positives, weights)
    dimage, dtext, totals = gradients_fake(*args, image_grad, text_grad, products)
    out = (dimage if image_grad else None, dtext if text_grad else None)
    sums = panel = None
    if _has_cuda_kernel(image, text):
        rows = min(len(image), BACKWARD_ROWS)
        panel = image.new_empty((rows, -(-len(text) // 8) * 8))
        sums = scale.new_zeros((2, _core.C.contrastive_num_sums(rows, len(text))))
    lse = (image_lse, text_lse)
    if products is None and _core.C.contrastive_backward(
        image, text, scale, bias, positives, *lse, *weights, factor, *out, sums, panel
    ):
        assert sums is not None
        return dimage, dtext, torch.sum(sums, 1, out=totals)
    gradient_chunks(*args, *out, totals.zero_(), products)
    return dimage, dtext, totals


def gradients_fake(
    image: Tensor, text: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image_grad, text_grad = [x for x in rest if isinstance(x, bool)][-2:]
    # With kept products no sum of products is rounded on the way to the features' dtype.
    kept = isinstance(rest[-1], Tensor)
    once = kept and len(image) <= chunk_rows(image, text)
    dimage = (image if kept else scale).new_empty(image.shape if image_grad else 0)
    dtext = (text if once else scale).new_empty(text.shape if text_grad else 0)
    return dimage, dtext, scale.new_empty(2)


def input_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    image: Tensor,
    text: Tensor,
    factor: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What the gradients op gives, for the inputs image, text, scale (and bias) that need it."""
    dimage, dtext, totals = grads
    need_image, need_text, *need_scalars = needs
    return (
        dimage.to(image.dtype) if need_image else None,
        dtext.to(text.dtype) if need_text else None,
        *(totals[i] * factor if need else None for i, need in enumerate(need_scalars)),
    )


def _clip_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _clip_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None
    image, text, scale, image_lse, text_lse, products = ctx.saved_tensors
    factor = dloss / (2 * len(image)) if len(image) else dloss
    grads = _gradients_op(
        *(image, text, scale, None, image_lse, text_lse, factor, True, [1.0, 1.0]),
        *(*ctx.needs_input_grad[:2], products if products.ndim == 2 else None),
    )
    return input_gradients(grads, image, text, factor, ctx.needs_input_grad)


def _siglip_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _siglip_backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None
    image, text, scale, bias, products = ctx.saved_tensors
    factor = dloss / len(image) if len(image) else dloss
    grads = _gradients_op(
        *(image, text, scale, bias, None, None, factor, True, [1.0, 1.0]),
        *(*ctx.needs_input_grad[:2], products if products.ndim == 2 else None),
    )
    return input_gradients(grads, image, text, factor, ctx.needs_input_grad)


_gradients_op = _library.define(
    "contrastive_gradients(Tensor image, Tensor text, Tensor scale, Tensor? bias, "
    "Tensor? image_lse, Tensor? text_lse, Tensor factor, bool positives, float[] weights, "
    "bool image_grad, bool text_grad, Tensor? products=None) -> (Tensor, Tensor, Tensor)",
    kernel=gradients,
    fake=gradients_fake,
    reference=gradients,
)
_clip_op = _library.define(
    "clip_loss(Tensor image_features, Tensor text_features, Tensor logit_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_clip_kernel,
    inference=_clip_inference,
    fake=_clip_fake,
    reference=reference,
    setup_context=_clip_setup_context,
    backward=_clip_backward,
)
_siglip_op = _library.define(
    "siglip_loss(Tensor image_features, Tensor text_features, Tensor logit_scale, "
    "Tensor? logit_bias) -> (Tensor, Tensor)",
    kernel=_siglip_kernel,
    inference=_siglip_inference,
    fake=_siglip_fake,
    reference=siglip_reference,
    setup_context=_siglip_setup_context,
    backward=_siglip_backward,
)
