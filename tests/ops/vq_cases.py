"""Codebooks that are hard to search, and the search by the formula in float64."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmkernels.ops.vq_lookup import VQLookup


def spread(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, dim), torch.randn(k, dim)


def taming(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """taming-transformers' initialisation: codes far smaller than tokens."""
    return torch.randn(n, dim), torch.empty(k, dim).uniform_(-1 / k, 1 / k)


def offset(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Everything far from 0: z.e says nothing in low precision."""
    return torch.randn(n, dim) + 300, torch.randn(k, dim) + 300


def duplicates(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Each code several times: more equals than a list of candidates holds."""
    few = torch.randn(max(1, k // 24), dim)
    return torch.randn(n, dim), few[torch.arange(k) % len(few)]


def near_duplicates(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes that differ in the last bits of fp32."""
    z, codes = duplicates(n, k, dim)
    return z, codes * (1 + torch.randint(-3, 4, codes.shape) * 2.0**-23)


def ascending(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Every code is nearer than all before it: a list of candidates is dropped again and again."""
    z = torch.randn(1, dim) + 1e-3 * torch.randn(n, dim)
    return z, z[:1] + torch.linspace(3, 0.5, k)[:, None] * normalize(torch.randn(k, dim), dim=1)


def dead(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Tokens at codes, most codes in one small heap."""
    codes = torch.randn(k, dim)
    codes[k // 4 :] = codes[0] + 1e-6 * codes[k // 4 :]
    return codes[torch.randint(k, (n,))] + 0.01 * torch.randn(n, dim), codes


def scales(n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Lengths over 20 powers of ten, zeros among them."""
    z, codes = spread(n, k, dim)
    z, codes = z * 10 ** (4 * torch.randn(n, 1)), codes * 10 ** (4 * torch.randn(k, 1))
    z[0], codes[k // 2] = 0, 0
    return z, codes


CODEBOOKS = (spread, taming, offset, duplicates, near_duplicates, ascending, dead, scales)


def distances(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """(num_tokens, num_codes) in float64, by the formula."""
    z, codebook = z.double()[:, None], codebook.double()[None]
    if metric == "euclidean":
        return (z - codebook).square().sum(-1)
    return 1 - (normalize(z, dim=-1, eps=2.0**-50) * normalize(codebook, dim=-1, eps=2.0**-50)).sum(
        -1
    )


def assert_exact(found: VQLookup, z: Tensor, codebook: Tensor, metric: str) -> None:
    """The index of the least float64 distance, and of equal codes the first one.

    Only where two different codes are equally far to float64's own rounding may it be either.
    """
    exact = distances(z, codebook, metric)
    least = exact.min(1).values
    got = exact.gather(1, found.indices[:, None])[:, 0]
    resolution = 4 * z.shape[1] * 2.0**-53
    slack = resolution * (least if metric == "euclidean" else 1)
    assert ((got - least) <= slack).all()
    # The codes that equal the one that was found.
    same = (codebook[found.indices][:, None] == codebook[None]).all(-1)
    assert torch.equal(same.int().argmax(1), found.indices)
    assert torch.equal(found.quantized, codebook[found.indices])
    rounding = 2.0**-23 * (least if metric == "euclidean" else 1)
    assert ((found.distance.double() - least).abs() <= rounding + slack).all()
    assert torch.equal(found.distance, found.codebook_distance)
