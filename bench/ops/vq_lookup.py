"""vq_lookup against the look-up of diffusers' VectorQuantizer: cdist, argmin, gather, loss."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize

from bench.case import Case, both_directions, dtype_name
from vlmkernels.testing.shapes import CODEBOOKS

CPU_TOKENS = {"vqgan_8192": 512}  # else 1024
GPU_TOKENS = 65536


def eager(
    z: Tensor, codebook: Tensor, metric: str = "euclidean"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if metric == "euclidean":
        indices = torch.cdist(z.detach().float(), codebook.detach().float()).argmin(1)
        quantized = embedding(indices, codebook)
        to_z = (z - quantized.detach()).square().sum(1)
        to_codes = (z.detach() - quantized).square().sum(1)
    else:
        unit, codes = normalize(z, dim=1), normalize(codebook, dim=1)
        indices = (unit.detach() @ codes.detach().T).argmax(1)
        quantized, nearest = embedding(indices, codebook), embedding(indices, codes)
        to_z = 1 - (unit * nearest.detach()).sum(1)
        to_codes = 1 - (unit.detach() * nearest).sum(1)
    return indices, z + (quantized - z).detach(), to_z.float(), to_codes.float()


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    on_gpu = device.startswith("cuda")
    for name, (num_codes, dim, metric) in CODEBOOKS.items():
        num_tokens = GPU_TOKENS if on_gpu else CPU_TOKENS.get(name, 1024)
        codebook = torch.randn(num_codes, dim, device=device)
        # Tokens near codes, as of a trained model: all agree which one is the nearest.
        z = codebook[torch.randint(num_codes, (num_tokens,), device=device)]
        z = z + 0.05 * torch.randn(num_tokens, dim, device=device)
        inputs = {
            "z": z.to(dtype).requires_grad_(),
            "codebook": codebook.to(dtype).requires_grad_(),
            "metric": metric,
        }
        size = dtype.itemsize
        rows, codes = num_tokens * dim * size, num_codes * dim * size
        yield from both_directions(
            "vq_lookup",
            inputs,
            eager,
            op=f"vq_lookup {metric}",
            shape=f"{name} {num_tokens}x{num_codes}x{dim}",
            dtype=dtype_name(z.to(dtype)),
            # Backward reads z, its codes and dquantized, and writes dz and dcodebook.
            bytes=(2 * rows + codes + 16 * num_tokens, 4 * rows + codes),
            flops=(2 * num_tokens * num_codes * dim, 0),
        )
