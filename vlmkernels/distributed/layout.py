"""Which rank of a context-parallel group holds which tokens of a sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 128  # tokens that stay together in the balanced layout: one tile of the attention kernels


@dataclass(frozen=True)
class Layout:
    """chunks[rank]: the ranges of positions that a rank holds, in the order of its tokens.

    Every position from 0 to num_tokens belongs to one rank; ranks may hold different numbers of
    tokens, also none.
    """

    num_tokens: int
    chunks: tuple[tuple[range, ...], ...]

    def __post_init__(self) -> None:
        for ranges in self.chunks:
            for a, b in pairwise(ranges):
                if a.stop > b.start or a.step < 1:
                    raise ValueError(f"Layout: the chunks of a rank must ascend, got {a}, {b}")
        held = torch.cat([torch.empty(0), *(self.positions(r) for r in range(self.size))])
        if not torch.equal(held.sort().values.long(), torch.arange(self.num_tokens)):
            raise ValueError(
                f"Layout: the chunks must hold each of {self.num_tokens} tokens once, got "
                f"{len(held)} of {len(held.unique())} different ones"
            )

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.chunks)

    def length(self, rank: int) -> int:
        """The number of tokens of a rank."""
        return sum(map(len, self.chunks[rank]))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """int32 (length(rank),): where the tokens of a rank stand in the sequence."""
        parts = [
            torch.arange(c.start, c.stop, c.step, dtype=torch.int32, device=device)
            for c in self.chunks[rank]
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device)

    def take(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The tokens of a rank out of all tokens (dim has num_tokens entries)."""
        parts = [
            x.narrow(dim, c.start, c.stop - c.start)
            if c.step == 1
            else x.index_select(dim, torch.arange(c.start, c.stop, c.step, device=x.device))
            for c in self.chunks[rank]
        ]
        if not parts:
            return x.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def put(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """All tokens out of the tokens of every rank, `take` undone."""
        shape = list(parts[0].shape)
        shape[dim] = self.num_tokens
        positions = torch.cat([self.positions(r, parts[0].device) for r in range(self.size)])
        held = torch.cat(list(parts), dim)
        return torch.empty(shape, dtype=held.dtype, device=held.device).index_copy(
            dim, positions.long(), held
        )


def _cuts(num_tokens: int, parts: int) -> list[int]:
    """Borders of `parts` ranges of nearly the same length."""
    return [i * num_tokens // parts for i in range(parts + 1)]


def contiguous(num_tokens: int, size: int) -> Layout:
    """Rank r holds the r-th part. Balanced without a causal mask."""
    cuts = _cuts(num_tokens, size)
    return Layout(num_tokens, tuple((range(a, b),) for a, b in pairwise(cuts)))


def zigzag(num_tokens: int, size: int) -> Layout:
    """Rank r holds parts r and 2 size - 1 - r of 2 size. Balances one causal sequence.

    Source: Zhu, zigzag ring attention (github.com/zhuzilin/ring-flash-attention).
    """
    cuts = _cuts(num_tokens, 2 * size)
    parts = [range(a, b) for a, b in pairwise(cuts)]
    return Layout(num_tokens, tuple((parts[r], parts[-1 - r]) for r in range(size)))


def striped(num_tokens: int, size: int) -> Layout:
    """Rank r holds the tokens r, r + size, ...

    Source: Brandon et al., Striped Attention (arXiv 2311.09431).
    """
    return Layout(
        num_tokens, tuple((range(min(r, num_tokens), num_tokens, size),) for r in range(size))
    )


def balanced(work: Tensor, size: int, chunk: int = CHUNK) -> Layout:
    """Chunks of neighbouring tokens, dealt out so that all ranks have the same work to do.

    Every rank gets the same number of chunks, give or take one. Costly chunks are dealt first, each
    to the rank with the least work that still has room; exchanges of single chunks between the
    busiest rank and the others then level what remains.

    Args:
        work: (num_tokens,), the keys that each query sees (`Mask.work`).
        size: ranks.
        chunk: tokens that stay together; a short sequence takes smaller ones, so that there are at
            least 8 chunks for each rank.
    """
    num_tokens = work.numel()
    chunk = max(1, min(chunk, num_tokens // (8 * size)))
    starts = range(0, num_tokens, chunk)
    costs = [float(part.sum()) for part in work.double().cpu().split(chunk)] if num_tokens else []
    hands = _deal(costs, size)
    _level(hands, costs)
    chunks = []
    for hand in hands:
        ranges = [range(starts[i], min(starts[i] + chunk, num_tokens)) for i in sorted(hand)]
        chunks.append(tuple(_merge(ranges)))
    return Layout(num_tokens, tuple(chunks))


def _deal(costs: Sequence[float], size: int) -> list[list[int]]:
    hands: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    room = [(len(costs) + size - 1 - r) // size for r in range(size)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = min((r for r in range(size) if len(hands[r]) < room[r]), key=loads.__getitem__)
        hands[rank].append(i)
        loads[rank] += costs[i]
    return hands


def _level(hands: list[list[int]], costs: Sequence[float]) -> None:
    """Exchanges chunks between the busiest and the idlest rank while that brings them closer."""
    loads = [sum(costs[i] for i in hand) for hand in hands]
    for _ in range(8 * len(hands)):
        high = max(range(len(hands)), key=loads.__getitem__)
        low = min(range(len(hands)), key=loads.__getitem__)
        gap = loads[high] - loads[low]
        swap = _best_swap(hands[high], hands[low], costs, gap / 2)
        if swap is None:
            return
        i, j = swap
        moved = costs[hands[high][i]] - costs[hands[low][j]]
        hands[high][i], hands[low][j] = hands[low][j], hands[high][i]
        loads[high] -= moved
        loads[low] += moved


def _best_swap(
    high: list[int], low: list[int], costs: Sequence[float], wanted: float
) -> tuple[int, int] | None:
    """Places (in high, in low) whose costs differ by about `wanted`; None if none would help."""
    if not high or not low:
        return None
    a = torch.tensor([costs[i] for i in high], dtype=torch.float64)
    b, order = torch.tensor([costs[i] for i in low], dtype=torch.float64).sort()
    near = torch.searchsorted(b, a - wanted).clamp(max=len(low) - 1)
    miss = (a - b[near] - wanted).abs()
    i = int(miss.argmin())
    if not miss[i] < wanted * 0.999:
        return None
    return i, int(order[near[i]])


def _merge(ranges: Sequence[range]) -> list[range]:
    merged: list[range] = []
    for part in ranges:
        if merged and merged[-1].stop == part.start:
            merged[-1] = range(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


FIXED: dict[str, Callable[[int, int], Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}
NAMES = (*FIXED, "balanced")
