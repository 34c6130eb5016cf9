"""The contrastive losses of a batch that is spread over processes, by a ring of text features.

Every process keeps its images; the texts (features, and their statistics or gradients) visit all
processes, one hop per block of logits, so that no process ever holds the features of the whole
batch, and every block is computed once.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from vlmkernels import ops
from vlmkernels.distributed.transport import Pending, Transport, transport_of
from vlmkernels.ops import _library
from vlmkernels.ops.contrastive_loss import (
    _scalar,
    gradients,
    gradients_fake,
    input_gradients,
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
    name, size = _name_and_size(group)
    if size == 1:
        return ops.clip_loss(image_features, text_features, scale)
    features = _library.autocast(image_features, text_features)
    loss, _, _ = _clip_op(*features, scale, name, local_loss, gather_with_grad)
    return loss  # type: ignore[no-any-return]


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
    name, size = _name_and_size(group)
    if size == 1:
        return ops.siglip_loss(image_features, text_features, scale, bias)
    features = _library.autocast(image_features, text_features)
    return _siglip_op(*features, scale, bias, name)  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_and_size(group: ProcessGroup | None) -> tuple[str, int]:
    """Ops know a process group by its name."""
    if group is None and not dist.is_initialized():
        return "", 1
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group.group_name, group.size()


def _ring(name: str) -> Transport:
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return transport_of(resolve(name))


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


def _clip_kernel(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    group: str,
    local_loss: bool,
    gather_with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _ring(group)
    image_lse, text_lse, positive = _ring_statistics(ring, image, text, scale)
    loss = mean_loss(image_lse, text_lse, positive)
    return loss if local_loss else ring.total(loss, WHAT) / ring.size, image_lse, text_lse


def _clip_fake(
    image: Tensor, text: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image_lse, text_lse = (scale.new_empty((2, len(features))) for features in (image, text))
    return torch.empty_like(scale), image_lse, text_lse


def _siglip_kernel(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, group: str
) -> Tensor:
    ring = _ring(group)
    ahead, block = ring.rotate(text, what=WHAT), text
    total = losses(image, block, scale, bias)
    for hop in range(1, ring.size):
        (block,) = ahead.wait()
        if hop + 1 < ring.size:
            ahead = ring.rotate(block, what=WHAT)
        total = total + losses(image, block, scale, bias, positives=False)
    return total.mean()


def _gradients_kernel(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_lse: Tensor | None,
    text_lse: Tensor | None,
    factor: Tensor,
    group: str,
    detached: bool,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gradients`, of this process's images and, over all images, of its texts.

    detached: images by the loss of their rows only, texts by that of their columns.
    """
    ring = _ring(group)
    calls = [([1.0, 1.0], (image_grad, text_grad))]
    if detached:
        calls = [([1.0, 0.0], (image_grad, False)), ([0.0, 1.0], (False, text_grad))]
    dimage = scale.new_zeros(image.shape if image_grad else 0)
    dtext, totals = scale.new_empty(0), scale.new_zeros(2)
    block = text
    block_lse: list[Tensor] = [] if text_lse is None else [text_lse]
    behind: Pending | None = None
    for hop in range(ring.size):
        ahead = ring.rotate(block, *block_lse, what=WHAT) if hop + 1 < ring.size else None
        columns = block_lse[0] if block_lse else None
        dblock: Tensor | None = None
        for weights, want in calls:
            dimage_part, dtext_part, part = gradients(
                *(image, block, scale, bias, image_lse, columns, factor, hop == 0, weights), *want
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


def _mean_kernel(x: Tensor, group: str) -> Tensor:
    ring = _ring(group)
    return ring.total(x, WHAT) / ring.size


def _clip_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, ctx.group, ctx.local_loss, ctx.gather_with_grad = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*features, *output[1:])


def _clip_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    image, text, scale, *lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    factor = _mean_op(dloss, ctx.group) / (2 * len(image))
    own = not ctx.gather_with_grad and not ctx.local_loss  # by this process's features alone
    part = factor / _ring(ctx.group).size if own else factor
    detached = not ctx.gather_with_grad and ctx.local_loss
    grads = _gradients_op(image, text, scale, None, *lse, part, ctx.group, detached, *needs[:2])
    *features, dscale = input_gradients(grads, image, text, factor, needs)
    dscale = None if dscale is None else _mean_op(dscale, ctx.group)
    return *features, dscale, None, None, None


def _siglip_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group = inputs
    ctx.save_for_backward(*tensors)


def _siglip_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    image, text, scale, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    factor = dloss / len(image)
    grads = _gradients_op(
        *(image, text, scale, bias, None, None, factor, ctx.group, False), *needs[:2]
    )
    return *input_gradients(grads, image, text, factor, needs), None


_mean_op = _library.define(
    "mean_over_group(Tensor x, str group) -> Tensor",
    kernel=_mean_kernel,
    fake=lambda x, group: torch.empty_like(x),
    reference=_mean_kernel,
)
_gradients_op = _library.define(
    "contrastive_ring_gradients(Tensor image, Tensor text, Tensor scale, Tensor? bias, "
    "Tensor? image_lse, Tensor? text_lse, Tensor factor, str group, bool detached, "
    "bool image_grad, bool text_grad) -> (Tensor, Tensor, Tensor)",
    kernel=_gradients_kernel,
    fake=gradients_fake,
    reference=_gradients_kernel,
)
_clip_op = _library.define(
    "clip_loss_ring(Tensor image, Tensor text, Tensor logit_scale, str group, bool local_loss, "
    "bool gather_with_grad) -> (Tensor, Tensor, Tensor)",
    kernel=_clip_kernel,
    fake=_clip_fake,
    reference=_clip_kernel,
    setup_context=_clip_setup_context,
    backward=_clip_backward,
)
_siglip_op = _library.define(
    "siglip_loss_ring(Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, "
    "str group) -> Tensor",
    kernel=_siglip_kernel,
    fake=lambda image, text, scale, *_: torch.empty_like(scale),
    reference=_siglip_kernel,
    setup_context=_siglip_setup_context,
    backward=_siglip_backward,
)
