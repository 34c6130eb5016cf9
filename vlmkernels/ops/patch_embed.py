"""patch_embed: images or patch rows to tokens, the patch embedding of every vision transformer."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlmkernels import _core
from vlmkernels.ops import _library


@_library.public
def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    """tokens[n, i] = weight · patch_i(x[n]) + bias + pos_embed[i]

    A convolution whose stride is its kernel size, as one matrix product that reads the patches
    straight from the image. Sums are in fp32 and rounded once. Rows and columns of pixels (and
    frames) that do not fill a patch are dropped, as by Conv2d and Conv3d. Under autocast the
    arguments are cast as theirs would be.

    Args:
        x: (num_patches, patch_dim) patch rows; or images (num_images, channels, h, w); or video
            (num_images, channels, t, h, w). fp16, bf16, fp32 or fp64. A last dimension that isn't
            contiguous costs a copy.
        weight: (hidden_dim, patch_dim); or Conv2d's (hidden_dim, channels, patch_h, patch_w); or
            Conv3d's (hidden_dim, channels, patch_t, patch_h, patch_w). patch_dim is the product of
            all sizes but the first. For images and video the weight has the rank of x; for rows it
            may have any of these shapes, the columns of a row then being in the order of its
            dimensions.
        bias: (hidden_dim,).
        pos_embed: (num_patches, hidden_dim), the same for every image; num_patches counts one
            image's.

    Returns:
        (num_patches, hidden_dim) for rows; else (num_images, num_patches, hidden_dim), patches in
        raster order (t, h, w). Unlike a convolution's output, hidden_dim comes last and the patches
        are one dimension. No rows or no images give an empty result.

    Raises:
        ValueError: shapes that do not fit together, an image smaller than a patch.
        TypeError: dtypes or devices that differ, or x isn't floating point.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021, eq. 1.
    """
    return _op(*_library.autocast(x, weight, bias, pos_embed))  # type: ignore[no-any-return]


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None
) -> Tensor:
    y = linear(_rows(x, weight), weight.flatten(1), bias)
    return y if pos_embed is None else y + pos_embed


def _grid(x: Tensor, weight: Tensor) -> list[int]:
    """Patches along each of (t,) h, w. A size 0 is for the kernel's checks to refuse."""
    return [
        size // (patch or 1) for size, patch in zip(x.shape[2:], weight.shape[2:], strict=False)
    ]


def _patches(x: Tensor, weight: Tensor) -> Tensor:
    """Images or video, less what fills no patch: a view (num_images, *grid, channels, *patch)."""
    grid = _grid(x, weight)
    for dim, (count, size) in reversed([*enumerate(zip(grid, weight.shape[2:], strict=True), 2)]):
        x = x.narrow(dim, 0, count * size).unflatten(dim, (count, size))
    axes = range(2, 2 + 2 * len(grid), 2)  # of the grid; each has its patch axis behind it
    return x.permute(0, *axes, 1, *(axis + 1 for axis in axes))


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Patch rows as they are; images and video as (num_images, num_patches, patch_dim)."""
    if x.ndim == 2:
        return x
    patches = math.prod(_grid(x, weight))
    return _patches(x, weight).reshape(x.shape[0], patches, math.prod(weight.shape[1:]))


def _output(x: Tensor, weight: Tensor) -> Tensor:
    hidden_dim = weight.shape[:1]
    if x.ndim <= 2:
        return x.new_empty(x.shape[:1] + hidden_dim)
    return x.new_empty((x.shape[0], math.prod(_grid(x, weight)), *hidden_dim))


def _dense(x: Tensor) -> Tensor:
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    y = _output(x, weight)
    if _core.C.patch_embed(_dense(x), weight.contiguous(), bias, pos_embed, y):
        return y
    del y  # linear makes its own, and is faster than addmm into y
    y = linear(_rows(x, weight), weight.flatten(1), bias)
    return y if pos_embed is None else y.add_(pos_embed)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    return _output(x, weight)


def _dx_kernel(dy: Tensor, weight: Tensor, shape: list[int]) -> Tensor:
    # Pixels that no patch reads have a zero gradient.
    dropped = any(size % patch for size, patch in zip(shape[2:], weight.shape[2:], strict=False))
    dx = dy.new_zeros(shape) if dropped else dy.new_empty(shape)
    if _core.C.patch_embed_dx(dy, weight.contiguous(), dx):
        return dx
    if dx.ndim == 2:
        return torch.mm(dy, weight.flatten(1), out=dx)
    patches = _patches(dx, weight)
    patches.copy_(dy.matmul(weight.flatten(1)).view(patches.shape))
    return dx


def _dx_fake(dy: Tensor, weight: Tensor, shape: list[int]) -> Tensor:
    return dy.new_empty(shape)


def _dweight_kernel(dy: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    dweight, dbias = _dweight_fake(dy, x, weight, bias)
    hidden_dim, patch_dim = weight.shape[0], math.prod(weight.shape[1:])
    splits = _core.C.patch_embed_splits(dy.numel() // hidden_dim, hidden_dim, patch_dim)
    workspace = None
    if splits > 1:  # with a column for dbias
        workspace = dy.new_empty((splits, hidden_dim, patch_dim + bias), dtype=torch.float32)
    if _core.C.patch_embed_dweight(dy, _dense(x), dweight, dbias if bias else None, workspace):
        return dweight, dbias
    dy, rows = dy.flatten(0, -2), _rows(x, weight).flatten(0, -2)
    torch.mm(dy.t(), rows, out=dweight.flatten(1))
    if bias:
        torch.sum(dy, 0, out=dbias)
    return dweight, dbias


def _dweight_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return dy.new_empty(weight.shape), dy.new_empty(weight.shape[:1] if bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
    ctx.shape = x.shape


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, need_dpos = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = _dx_op(dy, weight, ctx.shape) if need_dx else None
    dweight = dbias = dpos = None
    if need_dweight:
        dweight, dbias = _dweight_op(dy, x, weight, need_dbias)
    elif need_dbias:
        dbias = dy.flatten(0, -2).sum(0)
    if need_dpos:
        dpos = dy if len(ctx.shape) == 2 else dy.sum(0)
    return dx, dweight, dbias if need_dbias else None, dpos


_dx_op = _library.define(
    "patch_embed_dx(Tensor dy, Tensor weight, SymInt[] shape) -> Tensor",
    kernel=_dx_kernel,
    fake=_dx_fake,
    reference=_dx_kernel,
    cpu="its own matrix product",
)
_dweight_op = _library.define(
    "patch_embed_dweight(Tensor dy, Tensor x, Tensor weight, bool bias) -> (Tensor, Tensor)",
    kernel=_dweight_kernel,
    fake=_dweight_fake,
    reference=_dweight_kernel,
    cpu="its own matrix product",
)
_op = _library.define(
    "patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    cpu="its own matrix product",
)
