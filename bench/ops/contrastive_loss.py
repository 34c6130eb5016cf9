"""clip_loss and siglip_loss against the formulas that hold the batch x batch matrix of logits.

FLOPs of the backward are those of computing the logits again and of the two products with their
gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from bench.case import Case, both_directions, dtype_name


def eager_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """transformers' clip_loss: one matrix product, both directions from it."""
    logits = logit_scale * image_features @ text_features.t()
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.t(), labels)) / 2


def eager_siglip(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """transformers' SiglipModel.forward."""
    logits = logit_scale * text_features @ image_features.t() + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -logsigmoid(signs * logits).sum(-1).mean()


# The tower, dim of its published features (for SigLIP those of the model of that size), batches on
# a CPU and on a GPU.
CLIP = (
    ("vit_b_16_224", 512, (1024, 4096), (4096, 32768)),
    ("vit_l_14_336", 768, (2048,), (4096, 16384, 32768)),
    ("vit_h_14_224", 1024, (), (32768,)),
)
SIGLIP = (
    ("vit_b_16_224", 768, (1024, 4096), (4096, 32768)),
    ("siglip_so400m_14_384", 1152, (), (4096, 32768)),
)


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for op, shapes in (("clip_loss", CLIP), ("siglip_loss", SIGLIP)):
        for name, dim, on_cpu, on_gpu in shapes:
            for batch in on_gpu if device.startswith("cuda") else on_cpu:
                yield from cases_of(op, name, batch, dim, device, dtype)


def cases_of(
    op: str, name: str, batch: int, dim: int, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    def features() -> Tensor:
        return normalize(torch.randn(batch, dim, device=device), dim=-1).to(dtype)

    def parameter(value: float) -> Tensor:
        return torch.tensor(value, device=device).requires_grad_()

    inputs = {"image_features": features().requires_grad_()}
    inputs["text_features"] = features().requires_grad_()
    inputs["logit_scale"] = parameter(14.3 if op == "clip_loss" else 10.0)
    if op == "siglip_loss":
        inputs["logit_bias"] = parameter(-10.0)
    read = 2 * batch * dim * dtype.itemsize
    flops = 2 * batch * batch * dim
    yield from both_directions(
        op,
        inputs,
        eager_clip if op == "clip_loss" else eager_siglip,
        op=op,
        shape=f"{name} {batch}x{dim}",
        dtype=dtype_name(inputs["image_features"]),
        bytes=(read, 2 * read),
        flops=(flops, 3 * flops),
    )
