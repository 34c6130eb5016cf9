"""Ulysses: from tokens split over ranks to heads split over ranks, and back, by all-to-all.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
"""

import math

import torch
from torch import Tensor

from .transport import Transport


def split_heads(x: Tensor, lengths: list[int], transport: Transport, what: str) -> Tensor:
    """(batch, my tokens, num_heads, head_dim) -> (batch, all tokens, num_heads / size, head_dim).

    lengths: the tokens of each rank, which are the order of all tokens.
    """
    parts = [part.contiguous() for part in x.chunk(transport.size, dim=2)]
    like = [parts[0].new_empty((x.shape[0], n, *parts[0].shape[2:])) for n in lengths]
    return torch.cat(transport.swap(parts, like, what).wait(), dim=1)


def join_heads(x: Tensor, lengths: list[int], transport: Transport, what: str) -> Tensor:
    """(batch, all tokens, num_heads / size, ...) -> (batch, my tokens, num_heads, ...)"""
    parts = [part.contiguous() for part in x.split(lengths, dim=1)]
    like = [torch.empty_like(parts[transport.rank]) for _ in lengths]
    return torch.cat(transport.swap(parts, like, what).wait(), dim=2)


def copies_of_key_heads(num_heads: int, num_heads_k: int, size: int) -> int:
    """How often each key head must be repeated so that `size` ranks can share them out.

    Raises ValueError where query heads and ranks do not fit.
    """
    copies = size // math.gcd(num_heads_k, size)
    if num_heads % size or num_heads % (num_heads_k * copies):
        raise ValueError(
            f"ring_attention: q must have a multiple of {size} heads (and of "
            f"{num_heads_k * copies}) to be split over {size} Ulysses ranks, got {num_heads}"
        )
    return copies
