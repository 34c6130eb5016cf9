"""Attention of some queries to some keys, unrounded: what a ring computes at each hop."""

import torch
from torch import Tensor


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, positions_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32 (float64 for float64): out of softmax over these keys alone.

    q (batch, seqlen_q, num_heads, head_dim); k, v (batch, seqlen_k, num_heads_k, head_dim); first,
    last (1 or batch, seqlen_q), positions_k (seqlen_k,): see `Mask`. Where a query sees none of the
    keys out is 0 and lse -inf.
    """
    scores = _scores(q, k, first, last, positions_k, scale)
    lse = scores.logsumexp(-1) if k.shape[1] else scores.sum(-1) - torch.inf
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return (p @ _heads(v, q)).transpose(1, 2).contiguous(), lse


def partial_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    first: Tensor, last: Tensor, positions_k: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in float32 (float64) of these keys' part in the softmax over all keys.

    lse: over all keys; delta = rowsum(out dout) - dlse; both (batch, num_heads, seqlen_q).
    """
    scores = _scores(q, k, first, last, positions_k, scale)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    do = dout.transpose(1, 2).to(p.dtype)
    dv = p.transpose(2, 3) @ do
    ds = p * (do @ _heads(v, q).transpose(2, 3) - delta[..., None]) * scale
    dq = ds @ _heads(k, q)
    dk = ds.transpose(2, 3) @ q.transpose(1, 2).to(p.dtype)
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    dk, dv = (x.unflatten(1, groups).sum(2).transpose(1, 2) for x in (dk, dv))
    return dq.transpose(1, 2), dk, dv


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads(k: Tensor, q: Tensor) -> Tensor:
    wide = k.transpose(1, 2).to(accumulate_dtype(q))
    return wide.repeat_interleave(q.shape[2] // k.shape[2], dim=1)


def _scores(
    q: Tensor, k: Tensor, first: Tensor, last: Tensor, positions_k: Tensor, scale: float
) -> Tensor:
    scores = q.transpose(1, 2).to(accumulate_dtype(q)) @ _heads(k, q).transpose(2, 3) * scale
    unseen = (positions_k < first[..., None]) | (positions_k > last[..., None])
    return scores.masked_fill(unseen[:, None], -torch.inf)
