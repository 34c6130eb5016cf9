"""patch_embed: images or patch rows to tokens, the patch embedding of every vision transformer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlmkernels import _core
from vlmkernels.ops import _library, _patches


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
    y = linear(_patches.rows(x, weight), weight.flatten(1), bias)
    return y if pos_embed is None else y + pos_embed


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    y = _patches.output(x, weight)
    if _core.C.patch_embed(_patches.dense(x), weight.contiguous(), bias, pos_embed, y):
        return y
    shape = y.shape
    del y  # linear makes its own, and is faster than addmm into y
    y = linear(_gather(x, weight), weight.flatten(1), bias).view(shape)
    return y if pos_embed is None else y.add_(pos_embed)


def _gather(x: Tensor, weight: Tensor) -> Tensor:
    """(num_patches, patch_dim), of all images."""
    if x.ndim == 2:
        return x
    x, patches = _patches.dense(x), x.shape[0] * math.prod(_patches.grid(x, weight))
    rows = x.new_empty(patches, math.prod(weight.shape[1:]))
    if _core.C.patch_embed_rows(x, weight.contiguous(), None, 1, [], [], 1.0, rows):
        return rows
    return _patches.rows(x, weight).flatten(0, 1)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> Tensor:
    return _patches.output(x, weight)


def _dx_kernel(dy: Tensor, weight: Tensor, shape: list[int]) -> Tensor:
    # Pixels that no patch reads have a zero gradient.
    dropped = any(size % patch for size, patch in zip(shape[2:], weight.shape[2:], strict=False))
    dx = dy.new_zeros(shape) if dropped else dy.new_empty(shape)
    if _core.C.patch_embed_dx(dy, weight.contiguous(), dx):
        return dx
    if dx.ndim == 2:
        return torch.mm(dy, weight.flatten(1), out=dx)
    patches = _patches.views(dx, weight)
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
    if _core.C.patch_embed_dweight(
        dy, _patches.dense(x), dweight, dbias if bias else None, workspace
    ):
        return dweight, dbias
    dy, rows = dy.flatten(0, -2), _gather(x, weight)
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
    cpu="rows by C++, the product by PyTorch",
)
_dweight_op = _library.define(
    "patch_embed_dweight(Tensor dy, Tensor x, Tensor weight, bool bias) -> (Tensor, Tensor)",
    kernel=_dweight_kernel,
    fake=_dweight_fake,
    reference=_dweight_kernel,
    cpu="rows by C++, the product by PyTorch",
)
_op = _library.define(
    "patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    reference=reference,
    setup_context=_setup_context,
    backward=_backward,
    cpu="rows by C++, the product by PyTorch",
)


@_library.public
def patch_embed_pixels(
    images: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float = 1 / 255,
    grid_thw: Tensor | None = None,
    merge_size: int = 1,
) -> Tensor:
    """tokens[i] = weight · patch_i((images * rescale - mean) / std) + bias + pos_embed[i]

    Patch embedding of pixels as a decoder gives them: what an image processor does after resizing,
    and the convolution, as one matrix product. The normalisation is folded into the weight: with
    folded_weight = weight / std, pixels u enter the product as u - 128, exact in 16 bits, and the
    bias takes up the rest. A still image through a Conv3d's weight, where processors repeat
    it for every frame, meets the sum of the weight over its frames: half the work for Qwen2-VL.

    Args:
        images: uint8, or of weight's dtype. One of: (num_images, channels, h, w); video
            (num_images, channels, t, h, w); patch rows (num_patches, patch_dim), patch_dim without
            the frames for still images; a sequence of images (channels, h, w) of any sizes; such
            images packed, each flattened, one after another, into one dimension.
        weight: Conv2d's (hidden_dim, channels, patch_h, patch_w) or Conv3d's (hidden_dim, channels,
            patch_t, patch_h, patch_w); for patch rows also (hidden_dim, patch_dim), channels first.
        bias: (hidden_dim,).
        pos_embed: (num_patches, hidden_dim) in the order of the tokens: of one image, the same for
            every image; of all images for a sequence, packed images and rows.
        mean, std: a number for each channel, of the rescaled pixels.
        rescale: what pixels are multiplied with first.
        grid_thw: (num_images, 3) int32 or int64, (1, h, w) in patches, for packed images only. On
            the CPU: elsewhere it costs a synchronisation.
        merge_size: 1: patches in raster order (t, h, w). m > 1: in blocks of m x m patches, blocks
            and what is in them in raster order, as Qwen2-VL's processors order rows. h and w are
            then multiples of m patches.

    Returns:
        (num_images, num_patches, hidden_dim) for (num_images, ...); else (num_patches, hidden_dim)
        of all patches. Pixels that fill no patch are dropped as by a convolution; images of a
        sequence must be whole patches.

    Raises:
        ValueError: shapes that do not fit together, a grid that does not count the patches, mean or
            std that aren't one number per channel, a std or rescale that isn't positive.
        TypeError: a dtype or device other than those above.

    Source: the image processors of transformers (rescale, normalize, patchify of Qwen2-VL).
    """
    packed: Any = images
    if not isinstance(images, Tensor):
        packed, grid_thw = _patches.pack(images, weight, merge_size)
    tensors = _library.autocast(packed, weight, bias, pos_embed)
    numbers = ([float(x) for x in mean], [float(x) for x in std], float(rescale), merge_size)
    return _pixels_op(*tensors, grid_thw, *numbers)  # type: ignore[no-any-return]


def reference_pixels(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    grid: Tensor | None,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
) -> Tensor:
    folded = _patches.folded(images.shape, weight)
    rows = _patches.pixel_rows(images, folded, grid, merge).to(weight.dtype)
    rows = _patches.normalise(rows, mean, std, rescale)
    y = linear(rows, _patches.summed(weight, folded).flatten(1), bias)
    y = y.view(_patches.pixels_output(images, folded).shape)
    return y if pos_embed is None else y + pos_embed


def _pixels_kernel(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    grid: Tensor | None,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
) -> Tensor:
    images, weight, grid = (
        _patches.dense(images),
        weight.contiguous(),
        None if grid is None else grid.cpu(),
    )
    folded, table = _patches.folded(images.shape, weight), _patches.table(grid)
    numbers = (mean, std, rescale)
    _core.C.patch_embed_check_pixels(
        images, weight, folded, bias, pos_embed, grid, table, *numbers, merge
    )
    y, folded_bias = (
        _patches.pixels_output(images, folded),
        weight.new_empty(len(weight), dtype=_FP32),
    )
    if _core.C.patch_embed_fold(
        weight, bias, *numbers, _patches.centre(images), folded, folded_bias
    ):
        table = None if table is None else table.to(images.device, non_blocking=True)
        scale = rescale / std[0]  # what the fold leaves outside
        _core.C.patch_embed_pixels(images, folded, folded_bias, pos_embed, table, merge, scale, y)
        return y
    rows = _normalised_rows(images, folded, grid, table, *numbers, merge)
    y = linear(rows, _patches.summed(weight, folded).flatten(1), bias).view(y.shape)
    return y if pos_embed is None else y.add_(pos_embed)


def _normalised_rows(
    images: Tensor,
    folded: Tensor,
    grid: Tensor | None,
    table: Tensor | None,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
) -> Tensor:
    columns = folded[0].numel()
    rows = folded.new_empty(_patches.pixels_output(images, folded).numel() // len(folded), columns)
    if _core.C.patch_embed_rows(images, folded, table, merge, mean, std, rescale, rows):
        return rows
    rows = _patches.pixel_rows(images, folded, grid, merge).to(folded.dtype)
    return _patches.normalise(rows, mean, std, rescale)


def _pixels_fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, *_: Any
) -> Tensor:
    return _patches.pixels_output(images, _patches.folded(images.shape, weight))


def _pixels_dx_kernel(
    dy: Tensor,
    weight: Tensor,
    grid: Tensor | None,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
    shape: list[int],
) -> Tensor:
    folded, weight = _patches.folded(shape, weight), weight.contiguous()
    dropped = len(shape) > 2 and any(
        size % patch for size, patch in zip(shape[2:], folded.shape[2:], strict=True)
    )
    dx = dy.new_zeros(shape) if dropped else dy.new_empty(shape)
    grid, table = None if grid is None else grid.cpu(), _patches.table(grid)
    numbers = (mean, std, rescale)
    _core.C.patch_embed_check_pixels(dx, weight, folded, None, None, grid, table, *numbers, merge)
    unused = weight.new_empty(len(weight), dtype=_FP32)
    if _core.C.patch_embed_fold(weight, None, *numbers, 0.0, folded, unused):
        table = None if table is None else table.to(dx.device, non_blocking=True)
        _core.C.patch_embed_pixels_dx(dy, folded, table, merge, rescale / std[0], dx)
        return dx
    drows = dy.flatten(0, -2) @ _patches.summed(weight, folded).flatten(1)
    scale = drows.new_tensor([rescale / x for x in std])[:, None]
    drows = (drows.unflatten(1, (len(std), -1)) * scale).flatten(1)
    views = _patches.blocks(dx, folded, grid, merge)
    rows = [view.numel() // drows.shape[1] for view in views]
    for view, part in zip(views, drows.split(rows), strict=True):
        view.copy_(part.view(view.shape))
    return dx


def _pixels_dx_fake(dy: Tensor, *arguments: Any) -> Tensor:
    return dy.new_empty(arguments[-1])


def _pixels_dweight_kernel(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: bool,
    grid: Tensor | None,
    mean: list[float],
    std: list[float],
    rescale: float,
    merge: int,
) -> tuple[Tensor, Tensor]:
    images, dy, folded = (
        _patches.dense(images),
        dy.flatten(0, -2),
        _patches.folded(images.shape, weight),
    )
    dweight, dbias = _dweight_fake(dy, images, weight, bias)
    grid, table = None if grid is None else grid.cpu(), _patches.table(grid)
    numbers = (mean, std, rescale)
    _core.C.patch_embed_check_pixels(
        images, dweight, folded, None, None, grid, table, *numbers, merge
    )
    hidden_dim, columns = folded.shape[0], folded[0].numel()
    splits = _core.C.patch_embed_pixels_splits(dy.shape[0], hidden_dim, columns)
    workspace = dy.new_empty((splits, hidden_dim, columns + 1), dtype=_FP32)
    rows = dy.new_empty(dy.shape[0], (columns + 8) // 8 * 8)
    on_device = None if table is None else table.to(images.device, non_blocking=True)
    if _core.C.patch_embed_pixels_dweight(
        *(dy, images, folded, on_device, merge, *numbers, _patches.centre(images)),
        *(rows, workspace, dweight, dbias if bias else None),
    ):
        return dweight, dbias
    rows = _normalised_rows(images, folded, grid, table, *numbers, merge)
    dfolded = torch.mm(dy.t(), rows).view(folded.shape)
    # Every frame of a still image is the same.
    dweight.copy_(dfolded if weight.ndim == folded.ndim else dfolded.unsqueeze(2))
    if bias:
        torch.sum(dy, 0, out=dbias)
    return dweight, dbias


def _pixels_dweight_fake(
    dy: Tensor, images: Tensor, weight: Tensor, bias: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return _dweight_fake(dy, images, weight, bias)


def _pixels_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, _, grid, *numbers = inputs
    ctx.save_for_backward(images if ctx.needs_input_grad[1] else None, weight, grid)
    ctx.shape, ctx.numbers = images.shape, numbers


def _pixels_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, grid = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, need_dpos = ctx.needs_input_grad[:4]
    dy = dy.contiguous()
    dx = dweight = dbias = dpos = None
    if need_dx:
        dx = _pixels_dx_op(dy, weight, grid, *ctx.numbers, ctx.shape)
    if need_dweight:
        dweight, dbias = _pixels_dweight_op(dy, images, weight, need_dbias, grid, *ctx.numbers)
    elif need_dbias:
        dbias = dy.flatten(0, -2).sum(0)
    if need_dpos:
        dpos = dy if dy.ndim == 2 else dy.sum(0)
    return dx, dweight, dbias if need_dbias else None, dpos, None, None, None, None, None


_FP32 = torch.float32
_NUMBERS = "Tensor? grid_thw, float[] mean, float[] std, float rescale, int merge_size"
_pixels_dx_op = _library.define(
    f"patch_embed_pixels_dx(Tensor dy, Tensor weight, {_NUMBERS}, SymInt[] shape) -> Tensor",
    kernel=_pixels_dx_kernel,
    fake=_pixels_dx_fake,
    reference=_pixels_dx_kernel,
    cpu="rows by C++, the product by PyTorch",
)
_pixels_dweight_op = _library.define(
    "patch_embed_pixels_dweight(Tensor dy, Tensor images, Tensor weight, bool bias, "
    f"{_NUMBERS}) -> (Tensor, Tensor)",
    kernel=_pixels_dweight_kernel,
    fake=_pixels_dweight_fake,
    reference=_pixels_dweight_kernel,
    cpu="rows by C++, the product by PyTorch",
)
_pixels_op = _library.define(
    "patch_embed_pixels(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    f"{_NUMBERS}) -> Tensor",
    kernel=_pixels_kernel,
    fake=_pixels_fake,
    reference=reference_pixels,
    setup_context=_pixels_setup,
    backward=_pixels_backward,
    cpu="rows by C++, the product by PyTorch",
)
