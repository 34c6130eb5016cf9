"""What a context-parallel attention layer costs before anybody runs it: derived, never measured.

Per layer and rank; S = num_tokens / size tokens per rank, e bytes per element:
    compute      4 work num_heads head_dim / size / flops; backward 2.5 times that
    ring         size - 1 hops of 2 S num_heads_k head_dim e bytes; backward also float32 gradients
    all-gather   the same bytes at once; Ulysses: 1 / size of q, k, v and out to every other rank
    memory       q, k, v, out; what the exchange holds beside them, in float32 where it sums
Hops hide behind compute where they are shorter; a gather hides behind that of other heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

WAYS = ("p2p", "all_gather", "ulysses")


@dataclass(frozen=True)
class Machine:
    """flops: that attention achieves, per second. bandwidth: bytes per second, each direction."""

    flops: float = 600e12
    bandwidth: float = 360e9  # NVLink of an H100 at 80 % of 450 GB/s


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one layer's forward and backward on the busiest rank.

    exposed: transfer that no compute hides. hop_compute, hop_transfer: of one forward hop of the
    ring (of all hops, for the other ways).
    """

    way: str
    compute: float
    transfer: float
    exposed: float
    memory: int
    hop_compute: float
    hop_transfer: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def estimate(
    work: float | Tensor,
    num_tokens: int,
    size: int,
    num_heads: int,
    num_heads_k: int,
    head_dim: int,
    *,
    machine: Machine | None = None,
    element_size: int = 2,
) -> list[Cost]:
    """The ways that are possible, cheapest first. work: pairs of query and key (`Mask.work`)."""
    machine = machine or Machine()
    pairs = float(work.sum()) if isinstance(work, Tensor) else float(work)
    tokens = -(-num_tokens // size)
    forward = 4 * pairs * num_heads * head_dim / size / machine.flops
    compute = 3.5 * forward
    kv = 2 * tokens * num_heads_k * head_dim
    q = tokens * num_heads * head_dim
    own = (2 * q + kv) * element_size
    gradients = (q + kv) * 4
    hops = size - 1
    found = []

    def add(way: str, sent: Sequence[tuple[float, float, int]], extra: int) -> None:
        """sent: (bytes, compute beside it, how often)"""
        times = [(count, size_ / machine.bandwidth, beside) for size_, beside, count in sent]
        transfer = sum(count * t for count, t, _ in times)
        exposed = sum(count * max(0.0, t - beside) for count, t, beside in times)
        first = times[0]
        found.append(
            Cost(way, compute, transfer, exposed, own + gradients + extra, forward / size, first[1])
        )

    if size > 1:
        there, back = kv * element_size, kv * (element_size + 4)
        part = forward / size
        add("p2p", [(there, part, hops), (back, 2.5 * part, hops)], 2 * there + q * 4 + 2 * kv * 4)
        heads = num_heads_k  # gathered one after the other; nothing hides the first
        beside, bring, give = forward / heads, hops * there / heads, hops * back / heads
        whole = [(bring, beside, heads - 1), (bring, 0.0, 1), (give, 2.5 * beside, heads)]
        add("all_gather", whole, (kv * (element_size + 4)) * size // heads * 2)
        if num_heads % size == 0:
            copies = max(1, size // num_heads_k)
            moved = (2 * q + kv * copies) * element_size * hops / size
            add("ulysses", [(moved, 0.0, 1), (2 * moved, 0.0, 1)], own * copies)
    else:
        add("p2p", [(0, 0.0, 0)], 0)
    return sorted(found, key=lambda cost: cost.seconds)


def causal_pairs(num_tokens: int) -> float:
    """Pairs of query and key of one causal sequence."""
    return num_tokens * (num_tokens + 1) / 2
