"""The reference of the attention ops: every feature in plain differentiable PyTorch."""

import torch
from torch import Tensor

# Segment or image ids of queries and of keys, (batch, seqlen) each; None where there are none.
Ids = tuple[Tensor | None, Tensor | None]


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_lse(q: Tensor) -> Tensor:
    *batch, seqlen, num_heads, _ = q.shape
    return q.new_empty(*batch, num_heads, seqlen, dtype=lse_dtype(q))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    images_q: Tensor | None,
    images_k: Tensor | None,
    key_spans: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    segments, images = (segments_q, segments_k), (images_q, images_k)
    window = (window_left, window_right)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        seen = visible(q.shape[1], k.shape[1], window, segments, images, key_spans, q.device)
        return dense(q, k, v, seen, bias, softmax_scale, softcap)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for row, (a, b, c, d) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        cuts = (slice(a, b), slice(c, d))
        spans, _ = _part((key_spans, None), cuts)
        ids = _part(segments, cuts), _part(images, cuts)
        seen = visible(b - a, d - c, window, *ids, spans, q.device)
        of_row = None if bias is None else bias[row if len(bias) > 1 else 0, :, : b - a, : d - c]
        part = (q[None, a:b], k[None, c:d], v[None, c:d])
        parts.append(dense(*part, seen, of_row, softmax_scale, softcap))
    if not parts:  # no sequence at all, hence no token
        return q * 1, q.new_empty((q.shape[1], 0), dtype=lse_dtype(q))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]


def _part(ids: Ids, cuts: tuple[slice, slice]) -> Ids:
    of_q, of_k = (None if x is None else x[None, cut] for x, cut in zip(ids, cuts, strict=True))
    return of_q, of_k


def visible(
    seqlen_q: int,
    seqlen_k: int,
    window: tuple[int, int],
    segments: Ids,
    images: Ids,
    spans: Tensor | None,
    device: torch.device,
) -> Tensor:
    """True where a query sees a key: (batch or 1, 1, seqlen_q, seqlen_k)."""
    key = torch.arange(seqlen_k, device=device)
    distance = key - torch.arange(seqlen_q, device=device)[:, None] - (seqlen_k - seqlen_q)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        seen = seen & (distance >= -window[0])
    if window[1] >= 0:
        seen = seen & (distance <= window[1])
    seen = seen[None]
    if spans is not None:
        seen = (key >= spans[..., :1]) & (key < spans[..., 1:])
    if images[0] is not None and images[1] is not None:
        of_q = images[0][:, :, None]
        seen = seen | ((of_q >= 0) & (of_q == images[1][:, None]))
    if segments[0] is not None and segments[1] is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None])
    return seen[:, None]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    # Autocast would make halves of the sums that dtype is for.
    with torch.autocast(q.device.type, enabled=False):
        dtype = lse_dtype(q)
        heads_per_key_head = q.shape[2] // k.shape[2]
        qt = q.transpose(1, 2).to(dtype)
        kt = k.transpose(1, 2).to(dtype).repeat_interleave(heads_per_key_head, dim=1)
        vt = v.transpose(1, 2).to(dtype).repeat_interleave(heads_per_key_head, dim=1)
        scores = qt @ kt.transpose(2, 3) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(dtype)
            seen = seen & (bias != -torch.inf)  # a row of them: logsumexp's gradient is NaN
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = _logsumexp(scores)
        probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        return (probabilities @ vt).transpose(1, 2).to(q.dtype).contiguous(), lse


def _logsumexp(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:  # torch.logsumexp wants at least one
        return scores.sum(-1) - torch.inf
    return scores.logsumexp(-1)
