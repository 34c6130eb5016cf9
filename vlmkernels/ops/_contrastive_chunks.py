"""Contrastive losses where no kernel does the whole: matrix products, some rows at a time."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlmkernels import _core

# Rows of logits that are multiplied at a time, or more while their products are few: memory is
# linear in the batch.
CHUNK_ROWS, CHUNK_PRODUCTS = 512, 1 << 21
# Up to this size the products of a forward on the CPU stay in memory for the backward.
KEPT_BYTES = 64 << 20


def _operand(features: Tensor) -> Tensor:
    """As they are multiplied where there is no kernel: bf16 on the CPU is fast as it is."""
    if features.dtype == torch.float16 or (features.is_cuda and features.dtype == torch.bfloat16):
        return features.float()
    return features


def products_for(image: Tensor, text: Tensor) -> Tensor | None:
    """Memory for the products, where it pays to keep them for the backward."""
    if image.device.type != "cpu" or _core.emulating:
        return None
    dtype = torch.float32 if image.dtype == torch.float16 else image.dtype
    if image.shape[0] * text.shape[0] * dtype.itemsize > KEPT_BYTES:
        return None
    return image.new_empty((image.shape[0], text.shape[0]), dtype=dtype)


def _chunks(image: Tensor, text: Tensor, products: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their products with all texts: in `products`, or in memory that is
    used again."""
    image, text = _operand(image), _operand(text)
    if products is None:
        buffer = image.new_empty((chunk_rows(image, text), len(text)))
    for rows in _row_chunks(image, text):
        out = buffer[: rows.stop - rows.start] if products is None else products[rows]
        yield rows, torch.mm(image[rows], text.t(), out=out)


def chunk_rows(image: Tensor, text: Tensor) -> int:
    return min(len(image), max(CHUNK_ROWS, CHUNK_PRODUCTS // max(1, len(text))))


def _row_chunks(image: Tensor, text: Tensor) -> Iterator[slice]:
    count = chunk_rows(image, text)
    for first in range(0, len(image), max(1, count)):
        yield slice(first, min(first + count, len(image)))


def clip_chunks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    positive: Tensor | None,
    products: Tensor | None,
) -> None:
    text_max, text_sum = text_lse
    text_max.fill_(-math.inf)
    text_sum.zero_()
    for rows, part in _chunks(image, text, products):
        diagonal = None if positive is None else positive[rows]
        first = rows.start if positive is not None else len(text)
        row_max, row_log = image_lse[0, rows], image_lse[1, rows]
        out = (row_max, row_log, diagonal, text_max, text_sum)
        if not _core.C.clip_rows(part, scale, first, *out):
            logits = part * scale
            torch.amax(logits, 1, out=row_max)
            row_log.copy_((logits - row_max[:, None]).exp().sum(1).log())
            high = torch.maximum(text_max, logits.amax(0))
            text_sum.mul_((text_max - high).exp()).add_((logits - high).exp().sum(0))
            text_max.copy_(high)
            if diagonal is not None:
                diagonal.copy_(logits.diagonal(rows.start))
    text_sum.log_()


def siglip_chunks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sums: Tensor,
    positives: bool,
    products: Tensor | None,
) -> None:
    for rows, part in _chunks(image, text, products):
        first = rows.start if positives else text.shape[0]
        if not _core.C.siglip_rows(part, scale, bias, first, sums[rows]):
            logits = part * scale if bias is None else part * scale + bias
            torch.sum(-logsigmoid(-logits), 1, out=sums[rows])
            if positives:
                sums[rows] -= logits.diagonal(rows.start)


def gradient_chunks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_lse: Tensor | None,
    text_lse: Tensor | None,
    factor: Tensor,
    positives: bool,
    weights: list[float],
    dimage: Tensor | None,
    dtext: Tensor | None,
    totals: Tensor,
    products: Tensor | None,
) -> None:
    if dtext is not None and not len(image):
        dtext.zero_()
    by = factor * scale
    chunks = _chunks(image, text, None)
    if products is not None:
        chunks = ((rows, products[rows]) for rows in _row_chunks(image, text))
        buffer = products.new_empty((chunk_rows(image, text), len(text)))
    for rows, part in chunks:
        lse = None if image_lse is None else image_lse[:, rows].contiguous()
        sums = totals.new_empty((2, len(part)))
        first = rows.start if positives else len(text)
        options: tuple[Any, ...] = (first, lse, text_lse, *weights, sums, by)
        ds = part if products is None else buffer[: len(part)]
        if not _core.C.contrastive_gradient_rows(part, scale, bias, *options, ds):
            ds = _gradient_rows(part, scale, bias, *options)
        totals += sums.sum(1)
        if dimage is not None:
            _add_product(dimage[rows], ds, _operand(text), first=True)
        if dtext is not None:
            _add_product(dtext, ds.t(), _operand(image[rows]), first=rows.start == 0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b, or total += a b where it isn't the first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _gradient_rows(
    products: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first_positive: int,
    image_lse: Tensor | None,
    text_lse: Tensor | None,
    image_weight: float,
    text_weight: float,
    sums: Tensor,
    factor: Tensor,
) -> Tensor:
    logits = products * scale if bias is None else products * scale + bias
    if image_lse is None or text_lse is None:
        ds, share = logits.sigmoid(), 1.0
    else:
        ds = image_weight * (logits - image_lse[0, :, None] - image_lse[1, :, None]).exp()
        ds += text_weight * (logits - text_lse[0] - text_lse[1]).exp()
        share = image_weight + text_weight
    if first_positive < ds.shape[1]:
        ds.diagonal(first_positive).sub_(share)
    torch.sum(ds * products, 1, out=sums[0])
    torch.sum(ds, 1, out=sums[1])
    return ds.mul_(factor)
