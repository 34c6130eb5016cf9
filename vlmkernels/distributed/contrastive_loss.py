"""The contrastive losses of a batch that is spread over processes, by a ring of text features.

Every process keeps its images; the texts (features, and their statistics or gradients) visit all
processes, one hop per block of logits, so that no process ever holds the features of the whole
batch, and every block is computed once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vlmkernels import ops
from vlmkernels.distributed.transport import Pending, Transport, transport_of
from vlmkernels.ops import _library
from vlmkernels.ops.contrastive_loss import (
    _scalar,
    gradients,
    losses,
    mean_loss,
    merge,
    statistics,
)

WHAT = "contrastive_loss"


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    group: ProcessGroup | None = None,
    *,
    local_loss: bool = True,
    gather_with_grad: bool = True,
) -> Tensor:
    """`ops.clip_loss` of the features of all processes of a group.

    Args:
        image_features, text_features: (local batch, dim), of one shape on all processes.
        logit_scale: as in `ops.clip_loss`, the same on all processes.
        local_loss: returns the mean over this process's images and texts (against all texts and
            images); False: the mean over all, the same on every process.
        gather_with_grad: features get the gradient of the sum of all processes' returned losses,
            which is what data-parallel training (averaging gradients over processes) needs. False:
            that of the loss of this process by its own features alone, as open_clip's default:
            with local_loss the terms in which they are the other side are missing, without it they
            are 1 / processes of the full ones.

    logit_scale gets the gradient of the mean loss on every process. The upstream gradient is taken
    as its mean over the processes.
    """
    scale = _scalar("clip_loss: logit_scale", logit_scale, image_features)
    if transport_of(group).size == 1:
        return ops.clip_loss(image_features, text_features, scale)
    features = _library.autocast(image_features, text_features)
    apply: Any = _ClipLoss.apply
    loss: Tensor = apply(*features, scale, group, local_loss, gather_with_grad)
    return loss


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`ops.siglip_loss` of this process's images and the texts of all: the mean of it over the
    processes is the loss of the whole batch.

    Gradients are those of the sum of all processes' losses by the features, and of this process's
    loss by logit_scale and logit_bias: data-parallel training averages both, as with open_clip.
    """
    scale = _scalar("siglip_loss: logit_scale", logit_scale, image_features)
    bias = None
    if logit_bias is not None:
        bias = _scalar("siglip_loss: logit_bias", logit_bias, image_features)
    if transport_of(group).size == 1:
        return ops.siglip_loss(image_features, text_features, scale, bias)
    features = _library.autocast(image_features, text_features)
    apply: Any = _SiglipLoss.apply
    loss: Tensor = apply(*features, scale, bias, group)
    return loss


def _ring_statistics(
    ring: Transport, image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of this process's images and of its texts, and its positives' logits."""
    ahead, block = ring.rotate(text, what=WHAT), text
    image_lse, block_lse, positive = statistics(image, text, scale)
    behind = ring.rotate(block_lse, what=WHAT)  # follows its texts one hop behind
    for hop in range(1, ring.size):
        (block,) = ahead.wait()
        if hop + 1 < ring.size:
            ahead = ring.rotate(block, what=WHAT)
        rows, columns, _ = statistics(image, block, scale, positives=False)
        image_lse = merge(image_lse, rows)
        behind = ring.rotate(merge(behind.wait()[0], columns), what=WHAT)
    return image_lse, behind.wait()[0], positive


def _ring_gradients(
    ring: Transport,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    lse: tuple[Tensor, Tensor] | None,
    factor: Tensor,
    wanted: tuple[bool, bool],
    detached: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gradients`, of this process's images and, over all images, of its texts.

    detached: images by the loss of their rows only, texts by that of their columns.
    """
    calls = [([1.0, 1.0], wanted)]
    if detached:
        calls = [([1.0, 0.0], (wanted[0], False)), ([0.0, 1.0], (False, wanted[1]))]
    dimage = scale.new_zeros(image.shape) if wanted[0] else scale.new_empty(0)
    dtext, totals = scale.new_empty(0), scale.new_zeros(2)
    block = text
    block_lse: list[Tensor] = [] if lse is None else [lse[1]]
    behind: Pending | None = None
    for hop in range(ring.size):
        ahead = ring.rotate(block, *block_lse, what=WHAT) if hop + 1 < ring.size else None
        rows, columns = (None, None) if lse is None else (lse[0], block_lse[0])
        dblock: Tensor | None = None
        for weights, want in calls:
            dimage_part, dtext_part, part = gradients(
                *(image, block, scale, bias, rows, columns, factor, hop == 0, weights), *want
            )
            totals += part
            if want[0]:
                dimage += dimage_part
            if want[1]:
                dblock = dtext_part
        if dblock is not None:
            behind = ring.rotate(dblock if behind is None else dblock + behind.wait()[0], what=WHAT)
        if ahead is not None:
            block, *block_lse = ahead.wait()
    return dimage, dtext if behind is None else behind.wait()[0], totals


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        group: ProcessGroup | None,
        local_loss: bool,
        gather_with_grad: bool,
    ) -> Tensor:
        ring = transport_of(group)
        image_lse, text_lse, positive = _ring_statistics(ring, image, text, scale)
        ctx.save_for_backward(image, text, scale, image_lse, text_lse)
        ctx.ring, ctx.local_loss, ctx.gather_with_grad = ring, local_loss, gather_with_grad
        loss = mean_loss(image_lse, text_lse, positive)
        return loss if local_loss else ring.total(loss, WHAT) / ring.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *lse = ctx.saved_tensors
        ring, wanted = ctx.ring, ctx.needs_input_grad[:2]
        factor = ring.total(dloss, WHAT) / (ring.size * 2 * len(image))
        detached = not ctx.gather_with_grad and ctx.local_loss
        if not ctx.gather_with_grad and not ctx.local_loss:
            factor = factor / ring.size
        dimage, dtext, totals = _ring_gradients(
            *(ring, image, text, scale, None, lse, factor, wanted), detached=detached
        )
        dscale = None
        if ctx.needs_input_grad[2]:
            mean = factor if not ctx.gather_with_grad and not ctx.local_loss else factor / ring.size
            dscale = ring.total(totals[0] * mean, WHAT)
        return (
            dimage.to(image.dtype) if wanted[0] else None,
            dtext.to(text.dtype) if wanted[1] else None,
            *(dscale, None, None, None),
        )


class _SiglipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.ring = ring = transport_of(group)
        ctx.save_for_backward(image, text, scale, bias)
        ahead, block = ring.rotate(text, what=WHAT), text
        total = losses(image, block, scale, bias)
        for hop in range(1, ring.size):
            (block,) = ahead.wait()
            if hop + 1 < ring.size:
                ahead = ring.rotate(block, what=WHAT)
            total = total + losses(image, block, scale, bias, positives=False)
        return total.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, bias = ctx.saved_tensors
        wanted, factor = ctx.needs_input_grad[:2], dloss / len(image)
        dimage, dtext, totals = _ring_gradients(
            *(ctx.ring, image, text, scale, bias, None, factor, wanted)
        )
        return (
            dimage.to(image.dtype) if wanted[0] else None,
            dtext.to(text.dtype) if wanted[1] else None,
            totals[0] * factor if ctx.needs_input_grad[2] else None,
            totals[1] * factor if ctx.needs_input_grad[3] else None,
            None,
        )
