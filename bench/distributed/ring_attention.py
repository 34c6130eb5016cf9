"""ring_attention of several ranks on one device, one at a time, against the whole sequence at once.

Equal work: what the ring costs on top is merging, unrounded partial results, copies of keys and
the shape of the pieces. Nothing is transferred between devices.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, dtype_name, forward, gradient, lazily
from vlmkernels import ops
from vlmkernels.distributed import ContextPlan, ring_attention
from vlmkernels.testing.ranks import Ranks
from vlmkernels.testing.shapes import Shape, shape

NOTE = (
    "ring_attention runs its ranks one at a time on one device, and copies what it would send. Its "
    "eager is ops.attention of the whole sequence: at 1 the ring costs nothing."
)
DOCUMENT = 2048  # tokens of each packed document


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    cuda = device.startswith("cuda")
    for size in (2, 8):
        for packed in (False, True):
            tokens = size * 8192 if cuda else 2048
            yield from ring(shape("qwen2vl_7b"), size, tokens, packed, device, dtype)


def ring(
    s: Shape, size: int, num_tokens: int, packed: bool, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    heads = (s.num_heads, s.num_heads_k, s.num_heads_k)
    q, k, v = (
        torch.randn(num_tokens, h, s.head_dim, device=device).to(dtype).requires_grad_()
        for h in heads
    )
    length = min(DOCUMENT, num_tokens // 4) if packed else num_tokens
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device)
    mask: dict[str, Any] = {"causal": True, "cu_seqlens": cu_seqlens, "device": device}
    ranks = Ranks(size, one_at_a_time=True)
    plans = ranks.run(lambda transport: ContextPlan(num_tokens, group=transport, **mask))
    flops = 2 * num_tokens * length * s.num_heads * s.head_dim
    num_bytes = 2 * (q.numel() + k.numel()) * q.itemsize
    inputs = {"q": q, "k": k, "v": v}

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens, max_seqlen_q=length)

    def together(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return _OnRanks.apply(q, k, v, ranks, plans, s.head_dim**-0.5)  # type: ignore[no-untyped-call]

    kind = f"documents of {length}" if packed else "one document"
    for direction, bind in (("fwd", forward), ("bwd", gradient)):
        backward = direction == "bwd"
        yield Case(
            op="ring_attention",
            shape=f"{s.name} {size} ranks x {num_tokens // size}, {kind}",
            dtype=dtype_name(q),
            direction=direction,
            bytes=2 * num_bytes if backward else num_bytes,
            flops=5 * flops // 2 if backward else flops,
            variants={
                "vlmkernels": lazily(bind, together, inputs),
                "eager": lazily(bind, alone, inputs),
            },
            note=NOTE,
        )


class _OnRanks(torch.autograd.Function):
    """The ring as one function of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *whole, ctx.ranks, ctx.plans, ctx.scale = args

        def work(transport: Any) -> tuple[Tensor, ...]:
            plan = ctx.plans[transport.rank]
            q, k, v = (plan.shard(x.detach(), 0) for x in whole)
            with torch.no_grad():
                out, lse = ring_attention(q, k, v, plan, softmax_scale=ctx.scale, return_lse=True)
            return q, k, v, out, lse

        ctx.parts = ctx.ranks.run(work)
        joined: Tensor = ctx.plans[0].layout.put([part[3] for part in ctx.parts], 0)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # The op itself: autograd has one thread for a GPU, and that thread waits here.
        def work(transport: Any) -> Any:
            plan = ctx.plans[transport.rank]
            dout, *saved = (x[None] for x in (plan.shard(grads[0], 0), *ctx.parts[transport.rank]))
            with torch.no_grad():
                found = torch.ops.vlmkernels.ring_attention_backward(
                    dout, None, *saved, plan.handle, ctx.scale
                )
            return [grad[0] for grad in found]

        found = ctx.ranks.run(work)
        whole = (ctx.plans[0].layout.put(parts, 0) for parts in zip(*found, strict=True))
        return *whole, None, None, None
