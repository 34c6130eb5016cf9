"""qformer_attention against transformers' Q-Former: project K and V, then softmax attention."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import Case, both_directions, dtype_name
from vlmkernels.ops.qformer_attention import cheaper_form, flops
from vlmkernels.testing.shapes import shape

# Vision tower; queries, heads, head_dim; batch on a CPU, on a GPU. BLIP-2, twice its queries (the
# break-even), Qwen-VL's resampler, whose keys and values are of the tower's width here.
SIZES = (
    ("vit_g_14_224", (32, 12, 64), (4,), (32, 128)),
    ("vit_g_14_224", (64, 12, 64), (4,), (32,)),
    ("vit_bigg_14_448", (256, 32, 128), (1,), (8,)),
)


def eager(
    q: Tensor, x: Tensor, weight_k: Tensor, weight_v: Tensor, bias_k: Tensor, bias_v: Tensor
) -> Tensor:
    """Blip2QFormerMultiHeadAttention with eager_attention_forward."""
    k = linear(x, weight_k, bias_k).unflatten(-1, q.shape[2:]).transpose(1, 2)
    v = linear(x, weight_v, bias_v).unflatten(-1, q.shape[2:]).transpose(1, 2)
    scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).contiguous()


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for tower, queries, on_cpu, on_gpu in SIZES:
        for batch in on_gpu if device.startswith("cuda") else on_cpu:
            yield from cases_of(tower, batch, *queries, {"device": device, "dtype": dtype})


def cases_of(
    tower: str, batch: int, num_queries: int, num_heads: int, head_dim: int, like: dict[str, Any]
) -> Iterator[Case]:
    s = shape(tower)
    width, out_dim = s.hidden_dim, num_heads * head_dim
    sizes = (num_queries, s.num_tokens, num_heads, head_dim, width)
    inputs = {
        "q": torch.randn(batch, num_queries, num_heads, head_dim, **like),
        "x": torch.randn(batch, s.num_tokens, width, **like),
        "weight_k": torch.randn(out_dim, width, **like) * width**-0.5,
        "weight_v": torch.randn(out_dim, width, **like) * width**-0.5,
        "bias_k": torch.randn(out_dim, **like),
        "bias_v": torch.randn(out_dim, **like),
    }
    read = sum(t.numel() for t in inputs.values()) * inputs["x"].itemsize
    written = inputs["q"].numel() * inputs["x"].itemsize
    work = batch * flops(cheaper_form(*sizes), *sizes)
    yield from both_directions(
        "qformer_attention",
        # That of bias_k is zero: what eager gives is its rounding.
        {name: t.requires_grad_(name != "bias_k") for name, t in inputs.items()},
        eager,
        op="qformer_attention",
        shape=f"{tower} {batch}x{num_queries}x{s.num_tokens} {num_heads}x{head_dim}",
        dtype=dtype_name(inputs["x"]),
        bytes=(read + written, 2 * read + written),
        flops=(work, 2 * work),
    )
