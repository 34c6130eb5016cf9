"""Rivals of patch_embed: the convolution that published models run, and a matrix product."""

import torch.nn.functional as F
from torch import Tensor

from bench.rivals import NotSupportedError, rival


def _finish(tokens: Tensor, pos_embed: Tensor | None) -> Tensor:
    return tokens if pos_embed is None else tokens + pos_embed


@rival("patch_embed", "convolution")
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    """conv2d or conv3d; rows as one-patch images, as transformers' Qwen2-VL runs them."""
    patch = weight.shape[2:]
    if not patch:
        raise NotSupportedError("weight of a linear layer")
    conv = F.conv2d if len(patch) == 2 else F.conv3d
    if x.ndim == 2:
        y = conv(x.view(-1, *weight.shape[1:]), weight, bias, stride=patch)
        return _finish(y.flatten(1), pos_embed)
    return _finish(conv(x, weight, bias, stride=patch).flatten(2).transpose(1, 2), pos_embed)


@rival("patch_embed", "F.linear")
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    """The same as a matrix product of rows; images are unfolded first."""
    if x.ndim == 2:
        return _finish(F.linear(x, weight.flatten(1), bias), pos_embed)
    if x.ndim == 5:
        raise NotSupportedError("images and rows")
    rows = F.unfold(x, weight.shape[2:], stride=weight.shape[2:]).transpose(1, 2)
    return _finish(F.linear(rows, weight.flatten(1), bias), pos_embed)


@rival("patch_embed_pixels", "normalise + F.linear")
def pixels_linear(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    merge_size: int = 1,
) -> Tensor:
    """The processor's normalisation, rows, and a matrix product in the place of the convolution."""
    from bench.ops.patch_embed import normalised, rows_of

    if images.ndim != 4:
        raise NotSupportedError("images of one size")
    x = normalised(images, mean, std).to(weight.dtype)
    if weight.ndim == 4 and merge_size > 1:
        raise NotSupportedError("blocks through Conv3d only")
    if weight.ndim == 4:
        tokens: Tensor = linear(x, weight, bias)
        return tokens
    tokens = linear(rows_of(x, weight, merge_size), weight, bias)
    return tokens.view(len(images), -1, len(weight))
