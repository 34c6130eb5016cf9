"""Instead of a ring: all keys and values to everybody, some heads at a time; no merge.

The gather of the next heads runs beside the attention of these. Needs room for the gathered keys;
wins where documents are short, so that a ring would mostly carry what nobody sees.

Source: Grattafiori et al., The Llama 3 Herd of Models (arXiv 2407.21783), section 3.3.2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .block import accumulate_dtype, partial_attention, partial_attention_backward
from .ring import Shard
from .transport import Pending, Transport

GATHERED_BYTES = 1 << 30  # at most, of keys and values of the heads in use


def forward(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, transport: Transport, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries over all ranks' keys; out unrounded."""
    parts = [
        partial_attention(q[:, :, heads], kv[0], kv[1], shard.views[-1], scale)
        for heads, _, kv in _gathered(q, k, v, shard, transport, "ring_attention")
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    shard: Shard, transport: Transport, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), unrounded. Each rank sums what the others found for its keys, in rank order."""
    back = shard.order.argsort()
    dtype = accumulate_dtype(q)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dkv = torch.empty((2, *k.shape), dtype=dtype, device=k.device)
    what = "ring_attention backward"
    for heads, heads_k, kv in _gathered(q, k, v, shard, transport, what):
        dq[:, :, heads], *found = partial_attention_backward(
            dout[:, :, heads], q[:, :, heads], kv[0], kv[1], lse[:, heads], delta[:, heads],
            shard.views[-1], scale,
        )  # fmt: skip
        parts = torch.stack(found).index_select(2, back).split(shard.lengths, dim=2)
        mine = parts[transport.rank]
        like = [torch.empty_like(mine) for _ in shard.lengths]
        received = transport.swap(parts, like, f"{what}, gradients").wait()
        dkv[:, :, :, heads_k] = sum(received[1:], received[0])
    return dq, dkv[0], dkv[1]


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, transport: Transport, what: str
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(heads of q, heads of k, their keys and values of all ranks), some heads at a time."""
    num_heads_k, group = k.shape[2], q.shape[2] // k.shape[2]
    tokens = sum(shard.lengths)
    head_bytes = 2 * k.shape[0] * tokens * k.shape[3] * k.element_size()
    most = -(-num_heads_k // 2)  # two parts at least: the second travels beside the first
    step = max(1, min(most, GATHERED_BYTES // max(head_bytes, 1)))

    def start(first: int) -> Pending:
        mine = torch.stack((k[:, :, first : first + step], v[:, :, first : first + step]))
        like = [mine.new_empty((*mine.shape[:2], n, *mine.shape[3:])) for n in shard.lengths]
        return transport.swap([mine] * transport.size, like, what)

    pending = start(0)
    for first in range(0, num_heads_k, step):
        kv = torch.cat(pending.wait(), dim=2).index_select(2, shard.order)
        if first + step < num_heads_k:
            pending = start(first + step)
        last = min(first + step, num_heads_k)
        yield slice(first * group, last * group), slice(first, last), kv
