"""Images, video and packed images as patches, in plain PyTorch: what patch_embed is made of."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grid(x: Tensor, weight: Tensor) -> list[int]:
    """Patches along each of (t,) h, w. A size 0 is for the kernel's checks to refuse."""
    return [
        size // (patch or 1) for size, patch in zip(x.shape[2:], weight.shape[2:], strict=False)
    ]


def views(x: Tensor, weight: Tensor) -> Tensor:
    """Images or video, less what fills no patch: a view (num_images, *grid, channels, *patch)."""
    sizes = grid(x, weight)
    for dim, (count, size) in reversed([*enumerate(zip(sizes, weight.shape[2:], strict=True), 2)]):
        x = x.narrow(dim, 0, count * size).unflatten(dim, (count, size))
    axes = range(2, 2 + 2 * len(sizes), 2)  # of the grid; each has its patch axis behind it
    return x.permute(0, *axes, 1, *(axis + 1 for axis in axes))


def rows(x: Tensor, weight: Tensor) -> Tensor:
    """Patch rows as they are; images and video as (num_images, num_patches, patch_dim)."""
    if x.ndim == 2:
        return x
    patches = math.prod(grid(x, weight))
    return views(x, weight).reshape(x.shape[0], patches, math.prod(weight.shape[1:]))


def output(x: Tensor, weight: Tensor) -> Tensor:
    hidden_dim = weight.shape[:1]
    if x.ndim <= 2:
        return x.new_empty(*x.shape[:1], *hidden_dim)
    return x.new_empty(x.shape[0], math.prod(grid(x, weight)), *hidden_dim)


def dense(x: Tensor) -> Tensor:
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def pack(images: Sequence[Tensor], weight: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """Images one after another, and their grid."""
    if weight.ndim not in (4, 5):
        raise ValueError(
            "patch_embed_pixels: weight must be Conv2d's or Conv3d's for a sequence of images, "
            f"got {tuple(weight.shape)}"
        )
    patch, grid = [max(1, merge * size) for size in weight.shape[-2:]], []
    for i, image in enumerate(images):
        where = f"patch_embed_pixels: images[{i}] must"
        if not isinstance(image, Tensor):
            raise TypeError(f"{where} be a torch.Tensor, got {type(image).__name__}")
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise TypeError(
                f"{where} have the dtype and device of images[0] ({images[0].dtype}, "
                f"{images[0].device}), got {image.dtype}, {image.device}"
            )
        sizes = [*image.shape]
        if len(sizes) != 3 or sizes[0] != weight.shape[1]:
            raise ValueError(f"{where} have shape ({weight.shape[1]}, h, w), got {tuple(sizes)}")
        if sizes[1] % patch[0] or sizes[2] % patch[1] or 0 in sizes:
            raise ValueError(
                f"{where} have h and w multiples of patch * merge_size = {tuple(patch)}, "
                f"got {tuple(sizes)}"
            )
        grid.append([1, *(n // p for n, p in zip(sizes[1:], weight.shape[-2:], strict=True))])
    if not images:
        return weight.new_empty(0), torch.empty(0, 3, dtype=torch.int64)
    return torch.cat([image.reshape(-1) for image in images]), torch.tensor(grid)


def folded(images: Sequence[int], weight: Tensor) -> Tensor:
    """Memory of the weight that patches of images (a shape) meet: no frames if they are still."""
    still = len(images) in (1, 4)
    if len(images) == 2 and weight.ndim == 5:
        still = images[1] * weight.shape[2] == math.prod(weight.shape[1:])
    sizes = (
        [*weight.shape[1:2], *weight.shape[3:]] if still and weight.ndim == 5 else weight.shape[1:]
    )
    columns = math.prod(sizes)
    rows = weight.new_empty(weight.shape[0], -(-columns // 8) * 8)  # 16-byte aligned, as TMA wants
    return rows[:, :columns].view(weight.shape[0], *sizes)


def blocks(images: Tensor, folded: Tensor, grid: Tensor | None, merge: int) -> list[Tensor]:
    """Views of images with axes (..., channels, *patch), patches in order, the last of each view.

    One view of all images, or one of each packed image.
    """
    if images.ndim == 2:
        return [images]
    if grid is None:
        return [in_blocks(views(images, folded), merge)]
    found: list[Tensor] = []
    begin, (channels, *patch) = 0, folded.shape[1:]
    for _, h, w in grid.tolist():
        shape = (1, channels, h * patch[0], w * patch[1])
        image = images[begin : (begin := begin + math.prod(shape))].view(shape)
        found.append(in_blocks(views(image, folded), merge))
    return found


def in_blocks(patches: Tensor, merge: int) -> Tensor:
    """(num_images, (t,) h, w, channels, *patch) with h and w split into blocks and their inside."""
    h, w = (patches.ndim - 2) // 2 - 1, (patches.ndim - 2) // 2
    for axis in (w, h):
        patches = patches.unflatten(axis, (patches.shape[axis] // merge, merge))
    return patches.transpose(h + 1, w + 1)


def pixel_rows(images: Tensor, folded: Tensor, grid: Tensor | None, merge: int) -> Tensor:
    columns = math.prod(folded.shape[1:])
    parts = [view.reshape(-1, columns) for view in blocks(images, folded, grid, merge)]
    return torch.cat(parts) if parts else images.new_empty(0, columns)


def normalise(rows: Tensor, mean: list[float], std: list[float], rescale: float) -> Tensor:
    """rows (num_patches, patch_dim), whose columns begin with the channel."""
    centre, scale = (rows.new_tensor(values)[:, None] for values in (mean, std))
    x: Tensor = rows.unflatten(1, (len(mean), -1))
    return ((x * rescale - centre) / scale).flatten(1)


def summed(weight: Tensor, folded: Tensor) -> Tensor:
    return weight if weight.ndim == folded.ndim else weight.sum(2)


def pixels_output(images: Tensor, folded: Tensor) -> Tensor:
    if images.ndim == 1:
        return folded.new_empty(images.numel() // max(1, folded[:1].numel()), folded.shape[0])
    return folded.new_empty(output(images, folded).shape)


def table(grid: Tensor | None) -> Tensor | None:
    """Where the images of a grid begin, on the CPU: patch_embed_check_pixels fills it."""
    return None if grid is None else torch.empty(*grid.shape[:1], 4, dtype=torch.int32)


def centre(images: Tensor) -> float:
    """What the CUDA kernels subtract from pixels: it leaves bytes exact in 16 bits."""
    return 128.0 if images.dtype == torch.uint8 else 0.0
