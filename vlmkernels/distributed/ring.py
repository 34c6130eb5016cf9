"""The ring: every rank keeps its queries; keys and values go round, their gradients behind them.

All sums are in float32 (float64) and stay so until the last one: what goes from rank to rank are
keys and values as they are, and float32 gradients. So the error does not grow with the ring.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import View, accumulate_dtype, partial_attention, partial_attention_backward
from .transport import Transport


@dataclass(frozen=True)
class Shard:
    """What one rank knows of everybody's tokens; everybody's stand in ascending order.

    lengths: tokens of each rank. views: what this rank's queries see of each rank's keys; the last
    one, of all keys in order. visible[rank][source]: whether a query of rank sees a key of source.
    order: places of the sequence's tokens when those of all ranks stand side by side.
    """

    lengths: tuple[int, ...]
    views: tuple[View, ...]
    visible: tuple[tuple[bool, ...], ...]
    order: Tensor

    @functools.cached_property
    def hops(self) -> int:
        """Hops after which every rank has seen all that it can: keys of rank - hop at each."""
        size = len(self.lengths)
        return 1 + max(
            ((rank - source) % size)
            for rank in range(size)
            for source in range(size)
            if self.visible[rank][source] or rank == source
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, transport: Transport, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries over all ranks' keys; out unrounded."""
    hops, rank, size = shard.hops, transport.rank, transport.size
    out, lse = empty_result(q)
    kv, free = torch.stack((k, v)), None
    for hop in range(hops):
        source = (rank - hop) % size
        pending = None
        if hop + 1 < hops:  # the next keys travel while these are used
            like = _buffer(kv, shard, (source - 1) % size, free)
            pending = transport.shift(kv, like, 1, f"ring_attention: hop {hop + 1} of {hops}")
        if shard.visible[rank][source]:
            part = partial_attention(q, kv[0], kv[1], shard.views[source], scale)
            out, lse = merge(out, lse, *part)
        if pending is not None:
            free, kv = kv, pending.wait()[0]
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    shard: Shard, transport: Transport, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), unrounded. The gradients of a rank's keys follow them, one hop behind, and come
    home after the last."""
    hops, rank, size = shard.hops, transport.rank, transport.size
    dtype = accumulate_dtype(q)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    kv, free, coming = torch.stack((k, v)), None, None
    for hop in range(hops):
        source = (rank - hop) % size
        pending = None
        what = f"ring_attention backward: hop {hop + 1} of {hops}"
        if hop + 1 < hops:
            like = _buffer(kv, shard, (source - 1) % size, free)
            pending = transport.shift(kv, like, 1, what)
        dkv = torch.zeros_like(kv, dtype=dtype)
        if shard.visible[rank][source]:
            dq_part, dkv[0], dkv[1] = partial_attention_backward(
                dout, q, kv[0], kv[1], lse, delta, shard.views[source], scale
            )
            dq += dq_part
        if coming is not None:
            dkv += coming.wait()[0]
        if pending is not None:
            like = _buffer(dkv, shard, (source - 1) % size, None)
            coming = transport.shift(dkv, like, 1, f"{what}, gradients")
            free, kv = kv, pending.wait()[0]
    like = torch.empty((2, *k.shape), dtype=dtype, device=k.device)
    home = transport.shift(dkv, like, 1 - hops, "ring_attention backward: gradients come home")
    dk, dv = home.wait()[0]
    return dq, dk, dv


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that saw no key yet."""
    batch, seqlen, num_heads, _ = q.shape
    dtype = accumulate_dtype(q)
    lse = torch.full((batch, num_heads, seqlen), -torch.inf, dtype=dtype, device=q.device)
    return torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format), lse


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """out e^lse + part e^part_lse over their sum, and its logarithm; `out` is overwritten.

    One pass over out. Rows where neither saw a key stay 0 and -inf.
    """
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -torch.inf, 0)
    out.lerp_(part, weight.transpose(1, 2)[..., None])
    return out, torch.logaddexp(lse, part_lse)


def _buffer(kv: Tensor, shard: Shard, source: int, free: Tensor | None) -> Tensor:
    """Room for what comes from `source`: the buffer used two hops ago, if it fits."""
    shape = (2, kv.shape[1], shard.lengths[source], *kv.shape[3:])
    if free is not None and free.shape == shape:
        return free
    return kv.new_empty(shape)
