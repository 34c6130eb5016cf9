"""patch_embed against the convolution that it replaces: Conv2d, or transformers' Conv3d on rows.

From pixels, against what users pay without it: rescale and normalise, for Qwen2-VL rows with every
frame twice, and the convolution.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv3d

from bench.case import Case, both_directions, dtype_name
from vlmkernels.testing.shapes import Shape, shape

# name: x on a CPU, x on a GPU. The rows are what Qwen2-VL's processor gives.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "vit_b_16_224": ((2, 3, 224, 224), (64, 3, 224, 224)),
    "vit_l_14_336": ((1, 3, 336, 336), (16, 3, 336, 336)),
    "siglip_so400m_14_384": ((1, 3, 384, 384), (16, 3, 384, 384)),
    "qwen2vl_vision": ((256, 1176), (16384, 1176)),
}


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.ndim == 2:
        return conv3d(x.view(-1, *weight.shape[1:]), weight, bias).view(x.shape[0], -1)
    return conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


# uint8. Qwen2-VL: a batch of equal pictures; 16384 patches on a GPU.
PIXELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "vit_b_16_224": ((2, 3, 224, 224), (64, 3, 224, 224)),
    "vit_l_14_336": ((1, 3, 336, 336), (64, 3, 336, 336)),
    "qwen2vl_vision": ((1, 3, 224, 224), (16, 3, 448, 448)),
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalise_and_convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    merge_size: int,
) -> Tensor:
    """What an image processor and a vision tower do, pixels to tokens."""
    x = normalised(images, mean, std).to(weight.dtype)
    if weight.ndim == 4:
        return convolution(x, weight, bias)
    rows = rows_of(x, weight, merge_size)
    return convolution(rows, weight, bias).view(len(images), -1, len(weight))


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    centre, scale = (images.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (mean, std))
    return (images * (1 / 255) - centre) / scale


def rows_of(x: Tensor, weight: Tensor, m: int) -> Tensor:
    """patchify of transformers' Qwen2-VL processor: blocks of m x m patches, every frame again."""
    p = weight.shape[-1]
    x = x.unflatten(3, (-1, m, p)).unflatten(2, (-1, m, p))  # n c H mh ph W mw pw
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return x.expand(*x.shape[:6], weight.shape[2], p, p).reshape(-1, weight[0].numel())


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    on_gpu = device.startswith("cuda")
    for name, sizes in SHAPES.items():
        yield from cases_of(shape(name), sizes[on_gpu], device, dtype)
    for name, sizes in PIXELS.items():
        yield from pixel_cases_of(shape(name), sizes[on_gpu], device, dtype)


def pixel_cases_of(
    s: Shape, size: tuple[int, ...], device: str, dtype: torch.dtype
) -> Iterator[Case]:
    images = torch.randint(0, 256, size, device=device, dtype=torch.uint8)
    weight = torch.randn(s.hidden_dim, *s.patch, device=device, dtype=dtype) / 32
    bias = torch.randn(s.hidden_dim, device=device, dtype=dtype).requires_grad_()
    num_patches = images.numel() // (3 * s.patch[-1] ** 2)
    num_bytes = images.numel() + (weight.numel() + num_patches * s.hidden_dim) * dtype.itemsize
    flops = 2 * images.numel() * s.hidden_dim  # a still image needs no frames
    yield from both_directions(
        "patch_embed_pixels",
        {
            **{"images": images, "weight": weight.requires_grad_(), "bias": bias},
            **{"mean": MEAN, "std": STD, "merge_size": 2 if weight.ndim == 5 else 1},
        },
        normalise_and_convolve,
        op="patch_embed_pixels",
        shape=f"{s.name} {'x'.join(map(str, size))}",
        dtype=dtype_name(weight),
        bytes=(num_bytes, num_bytes),
        flops=(flops, flops),
    )


def cases_of(s: Shape, size: tuple[int, ...], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Pixels need no gradient: backward is that of weight and bias."""
    x = torch.randn(size, device=device, dtype=dtype)
    weight = torch.randn(s.hidden_dim, *s.patch, device=device, dtype=dtype).requires_grad_()
    bias = torch.randn(s.hidden_dim, device=device, dtype=dtype).requires_grad_()
    num_patches = size[0] if len(size) == 2 else size[0] * prod(n // s.patch[-1] for n in size[2:])
    num_bytes = (x.numel() + weight.numel() + num_patches * s.hidden_dim) * x.itemsize
    flops = 2 * num_patches * weight.numel()
    yield from both_directions(
        "patch_embed",
        {"x": x, "weight": weight, "bias": bias},
        convolution,
        op="patch_embed",
        shape=f"{s.name} {'x'.join(map(str, size))}",
        dtype=dtype_name(x),
        bytes=(num_bytes, num_bytes),
        flops=(flops, flops),
    )
