"""Rivals of vq_lookup: vector-quantize-pytorch's codebook, and flash-kmeans' assignment (CUDA)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.rivals import NotSupportedError, rival

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _finish(z: Tensor, codebook: Tensor, indices: Tensor, quantized: Tensor, metric: str) -> Found:
    if metric == "euclidean":
        distance = (z.float() - quantized.float()).square().sum(1)
    else:
        unit = normalize(z.float(), dim=1)
        distance = 1 - (unit * normalize(quantized.float(), dim=1)).sum(1)
    return indices, quantized, distance, distance


def _forward_only(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotSupportedError("no gradient of distance and codebook apart")


@rival("vq_lookup", "vector-quantize-pytorch", "vector_quantize_pytorch")
def lucidrains(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Found:
    """`Codebook.forward` in evaluation, which is where its module spends its time."""
    from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

    _forward_only(z, codebook)
    cosine = metric == "cosine"
    module = Codebook(*codebook.shape[::-1], use_cosine_sim=cosine).to(z.device).eval()
    module.embed = (normalize(codebook, dim=1) if cosine else codebook)[None]
    x = normalize(z, dim=1) if cosine else z
    _, indices, _ = module(x[None])
    return _finish(z, codebook, indices[0], codebook[indices[0]], metric)


@rival("vq_lookup", "flash-kmeans", "flash_kmeans", needs_cuda=True)
def flash_kmeans(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Found:
    """Not exact: fp32 goes through TF32."""
    from flash_kmeans.assign_euclid_triton import cosine_assign_triton, euclid_assign_triton

    _forward_only(z, codebook)
    if metric == "cosine":
        x, codes = normalize(z, dim=1), normalize(codebook, dim=1)
        indices = cosine_assign_triton(x[None], codes[None])[0].long()
    else:
        squares = z.float().square().sum(1)[None]
        indices = euclid_assign_triton(z[None], codebook[None], squares)[0].long()
    return _finish(z, codebook, indices, codebook[indices], metric)
