"""patch_embed against the convolution that it replaces: Conv2d, or transformers' Conv3d on rows."""

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


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, (on_cpu, on_gpu) in SHAPES.items():
        size = on_gpu if device.startswith("cuda") else on_cpu
        yield from cases_of(shape(name), size, device, dtype)


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
