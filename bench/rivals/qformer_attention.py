"""Rivals of qformer_attention: F.linear and PyTorch's attention, or the absorbed form by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.rivals import NotSupportedError, rival


def _expect_all_tokens(options: dict[str, Any]) -> None:
    if any(value is not None for value in options.values()):
        raise NotSupportedError("all tokens, no positions")


@rival("qformer_attention", "SDPA + F.linear")
def sdpa(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """PyTorch's choice of backend, as transformers with attn_implementation="sdpa"."""
    _expect_all_tokens(options)
    k = F.linear(x, weight_k, bias_k).unflatten(-1, q.shape[2:])
    v = F.linear(x, weight_v, bias_v).unflatten(-1, q.shape[2:])
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2)


@rival("qformer_attention", "SDPA cuDNN + F.linear", needs_cuda=True)
def sdpa_cudnn(**inputs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(**inputs)  # type: ignore[no-any-return]


@rival("qformer_attention", "absorbed, torch.matmul")
def matmul(
    q: Tensor,
    x: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The same order of products, each result in memory."""
    _expect_all_tokens(options)
    heads, dim = q.shape[2:]
    rows = torch.matmul(q.transpose(1, 2), weight_k.view(heads, dim, -1)).flatten(1, 2)
    p = torch.softmax(torch.matmul(rows, x.mT) * dim**-0.5, dim=-1)
    y = torch.matmul(p, x).unflatten(1, (heads, -1))
    out = torch.matmul(y, weight_v.view(heads, dim, -1).mT).transpose(1, 2)
    return out if bias_v is None else out + bias_v.view(heads, dim)
