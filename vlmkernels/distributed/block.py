"""Attention of some queries to some keys, unrounded: what a ring computes at each hop."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops


@dataclass(frozen=True)
class View:
    """What queries see of keys that stand in ascending order: all, those up to the query's own
    (causal, aligned bottom-right), or spans.

    spans: int32 (1 or batch, seqlen_q, 2), query i sees the keys from spans[i, 0] to before
    spans[i, 1].
    """

    causal: bool = False
    spans: Tensor | None = None

    def options(self, batch: int) -> dict[str, Any]:
        if self.spans is None:
            return {"causal": self.causal}
        return {"key_spans": self.spans.expand(batch, -1, -1).contiguous()}


def view_of(first: Tensor, last: Tensor, positions: Tensor) -> View:
    """What queries that see the positions first[i] to last[i] see of keys at these positions.

    Looks at the values: once per batch, in the plan.
    """
    begin = torch.searchsorted(positions, first)
    end = torch.searchsorted(positions, last, right=True).maximum(begin)
    seqlen_q, seqlen_k = first.shape[1], len(positions)
    if not bool(begin.any()):
        if bool((end == seqlen_k).all()):
            return View()
        diagonal = torch.arange(seqlen_q, device=end.device) + 1 + seqlen_k - seqlen_q
        if torch.equal(end, diagonal.clamp(min=0).expand_as(end)):
            return View(causal=True)
    return View(spans=torch.stack((begin, end), -1).int())


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, view: View, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32 (float64 for float64): out of softmax over these keys alone.

    q (batch, seqlen_q, num_heads, head_dim); k, v (batch, seqlen_k, num_heads_k, head_dim). Where
    a query sees none of the keys out is 0 and lse -inf.
    """
    return ops.attention_partial(q, k, v, softmax_scale=scale, **view.options(len(q)))


def partial_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, view: View,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in float32 (float64) of these keys' part in the softmax over all keys.

    lse: over all keys; delta = rowsum(out dout) - dlse; both (batch, num_heads, seqlen_q).
    """
    return ops.attention_partial_backward(
        dout, q, k, v, lse, delta, softmax_scale=scale, **view.options(len(q))
    )


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
