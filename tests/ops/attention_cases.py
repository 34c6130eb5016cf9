"""What the attention tests share: eager attention, random problems full of NaN traps, the check."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.conftest import Backend
from vlmkernels import ops
from vlmkernels.testing import assert_as_accurate, max_error

Attention = Callable[..., tuple[Tensor, Tensor]]


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v and lse, dense, all in the dtype of q: what people write by hand.

    mask: (batch or 1, seqlen_q, seqlen_k), True where a query sees a key.
    """
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen = torch.ones(1, seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(seqlen_k - seqlen_q)
    seen = (seen if mask is None else seen & mask)[:, None]
    blind = ~seen.any(-1)  # queries that see no key
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind[..., None], 0)
    probabilities = scores.softmax(-1).masked_fill(blind[..., None], 0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
    lse = scores.logsumexp(-1) if seqlen_k else scores.sum(-1)
    return out, lse.masked_fill(blind, -torch.inf)


def eager_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], causal: bool
) -> tuple[Tensor, Tensor]:
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    outs, lses = zip(*(eager(a[None], b[None], c[None], causal) for a, b, c in parts), strict=True)
    return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]


def cu_seqlens(lengths: list[int], device: str) -> Tensor:
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Problem:
    """Inputs and the gradients of out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        q, k, v, dout = (x.to(dtype) for x in (self.q, self.k, self.v, self.dout))
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, q=q, k=k, v=v, dout=dout, bias=bias)

    def results(self, attention: Attention) -> list[Tensor]:
        """out, lse, dq, dk, dv, and dbias if there is one; attention takes (q, k, v[, bias])."""
        inputs = (self.q, self.k, self.v, self.bias)
        leaves = [x.detach().requires_grad_() for x in inputs if x is not None]
        out, lse = attention(*leaves)
        # Of a row that sees no key anything may come back: exp(lse - lse) is NaN there.
        dlse = self.dlse.to(lse.dtype).masked_fill(lse == -torch.inf, torch.nan)
        return [out, lse, *torch.autograd.grad((out, lse), leaves, (self.dout, dlse))]


def trapped(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random heads (..., tokens, num_heads, head_dim), a slice of a larger tensor of NaN."""
    *batch, tokens, num_heads, head_dim = shape
    storage = torch.full((*batch, tokens + 3, num_heads + 2, head_dim + 8), torch.nan, dtype=dtype)
    view = storage.to(device)[..., 1 : tokens + 1, 1 : num_heads + 1, :head_dim]
    return view.copy_(torch.randn(shape))


def problem(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, backend: Backend
) -> Problem:
    *batch, tokens, num_heads, _ = q_shape
    return Problem(
        trapped(q_shape, dtype, backend.device),
        trapped(k_shape, dtype, backend.device),
        trapped(k_shape, dtype, backend.device),
        trapped(q_shape, dtype, backend.device),
        torch.randn(*batch, num_heads, tokens, device=backend.device),
    )


def check(
    p: Problem, attention: Attention, by_hand: Attention, name: str = "", *, factor: float = 2.0
) -> None:
    """Against float64, with eager PyTorch in the same dtype (lse: float32) as the yardstick."""
    got, same = p.results(attention), p.results(by_hand)
    exact = p.to(torch.float64).results(by_hand)
    same[1] = p.to(torch.float32).results(by_hand)[1]
    parts = ("out", "lse", "dq", "dk", "dv", "dbias")[: len(got)]
    for part, *values in zip(parts, got, same, exact, strict=True):
        assert values[0].is_contiguous()
        if not (part.startswith("d") and max_error(values[0], values[2]) <= cancellation(p)):
            assert_as_accurate(f"{name} {part}", *values, factor=factor)


def cancellation(p: Problem) -> float:
    """In ds = p (dout v^T - delta) the difference may be far smaller than its terms: one float32
    rounding of these, through k or q, is no error of the kernel."""
    if not p.k.numel() or not p.q.numel():
        return 0.0
    term = p.dout.double().norm(dim=-1).max() * p.v.double().norm(dim=-1).max()
    factor = torch.maximum(p.q.abs().max(), p.k.abs().max()) * p.q.shape[-1] ** -0.5
    return float(torch.finfo(torch.float32).eps * term * factor)


def check_dense(
    backend: Backend,
    shape: tuple[int, int, int, int, int, int],
    causal: bool,
    dtype: torch.dtype,
    softmax_scale: float | None = None,
) -> None:
    """shape: batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim."""
    batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim = shape
    p = problem(
        (batch, seqlen_q, num_heads, head_dim),
        (batch, seqlen_k, num_heads_k, head_dim),
        *(dtype, backend),
    )

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, return_lse=True)

    check(p, ours, lambda *qkv: eager(*qkv, causal, softmax_scale), f"{shape} {causal} {dtype}")


@dataclass(frozen=True)
class Masks:
    """What restricts or shifts scores, as `ops.attention` takes it, and by definition."""

    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    segment_ids: tuple[Tensor, Tensor] | None = None
    image_ids: tuple[Tensor, Tensor] | None = None

    def options(self) -> dict[str, Any]:
        return dict(vars(self))

    def seen(self, p: Problem) -> Tensor:
        """(batch, seqlen_q, seqlen_k), pair by pair."""
        batch, seqlen_q, seqlen_k = len(p.q), p.q.shape[1], p.k.shape[1]
        left, right = self.window_size
        rows = []
        for b in range(batch):
            of_q, of_k = self.of_row(self.segment_ids, b), self.of_row(self.image_ids, b)
            for i in range(seqlen_q):
                for j in range(seqlen_k):
                    distance = j - (i + seqlen_k - seqlen_q)
                    window = (left < 0 or distance >= -left) and (right < 0 or distance <= right)
                    image = bool(of_k) and of_k[0][i] == of_k[1][j] >= 0
                    segment = not of_q or of_q[0][i] == of_q[1][j]
                    rows.append(segment and (window or image))
        return torch.tensor(rows, device=p.q.device).view(batch, seqlen_q, seqlen_k)

    @staticmethod
    def of_row(ids: tuple[Tensor, Tensor] | None, row: int) -> list[list[int]]:
        return [] if ids is None else [x[row].tolist() for x in ids]


def check_masked(
    p: Problem, masks: Masks, name: str = "", *, softmax_scale: float | None = None
) -> None:
    seen, softcap = masks.seen(p), masks.softcap

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        return ops.attention(
            q, k, v, bias=bias, softmax_scale=softmax_scale, return_lse=True, **masks.options()
        )

    def by_hand(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        return eager(q, k, v, False, softmax_scale, mask=seen, bias=bias, softcap=softcap)

    check(p, ours, by_hand, name, factor=3.0 if softcap else 2.0)


def run_emulated(program: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A program in a process of its own on the emulated GPU, with more environment variables."""
    environment = {**os.environ, "VLMKERNELS_EMULATE": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True
    )
