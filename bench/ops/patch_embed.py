"""patch_embed against Conv2d and Conv3d (eager), and against unfolding and nn.functional.linear."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv3d

from bench.case import Case
from vlmkernels import ops
from vlmkernels.ops.patch_embed import reference

# name: x on a GPU, x on a CPU, weight. The rows are what Qwen2-VL's processor gives.
SHAPES = {
    "vit_b16 224": ((64, 3, 224, 224), (2, 3, 224, 224), (768, 3, 16, 16)),
    "clip_l14 336": ((16, 3, 336, 336), (1, 3, 336, 336), (1024, 3, 14, 14)),
    "siglip_so400m 384": ((16, 3, 384, 384), (1, 3, 384, 384), (1152, 3, 14, 14)),
    "qwen2vl rows": ((16384, 1176), (256, 1176), (1280, 3, 2, 14, 14)),
}


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The code patch_embed replaces; for rows as transformers' Qwen2-VL writes it."""
    if x.ndim == 2:
        return conv3d(x.view(-1, *weight.shape[1:]), weight, bias).view(x.shape[0], -1)
    return conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, (on_gpu, on_cpu, weight_shape) in SHAPES.items():
        x = torch.randn(on_gpu if device == "cuda" else on_cpu, device=device).to(dtype)
        weight, bias = (
            torch.randn(weight_shape, device=device).to(dtype),
            x.new_zeros(weight_shape[0]),
        )
        leaves = [t.detach().requires_grad_() for t in (weight, bias)]
        functions = {"vlmkernels": ops.patch_embed, "eager": convolution, "linear": reference}
        y = ops.patch_embed(x, weight, bias)
        dy = torch.randn_like(y)
        flops = 2 * y.numel() * math.prod(weight_shape[1:])
        num_bytes = (x.numel() + weight.numel() + y.numel()) * dtype.itemsize

        def forward(run: Any, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Any:
            return lambda: run(x, weight, bias)

        def both(run: Any, x: Tensor = x, leaves: list[Tensor] = leaves, dy: Tensor = dy) -> Any:
            return lambda: torch.autograd.grad(run(x, *leaves), leaves, dy)

        for direction, wrap, times in (("fwd", forward, 1), ("fwd+bwd", both, 2)):
            yield Case(
                op="patch_embed",
                shape=f"{name} {'x'.join(map(str, x.shape))}",
                dtype=str(dtype).removeprefix("torch."),
                direction=direction,
                bytes=num_bytes * times,
                flops=flops * times,
                variants={key: wrap(run) for key, run in functions.items()},
            )
