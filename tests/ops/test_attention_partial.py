"""attention_partial: parts over disjoint keys combine to the whole, forward and backward."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from tests.ops.attention_cases import Problem, cu_seqlens, problem
from vlmkernels import ops
from vlmkernels.testing import assert_as_accurate, max_error

CUTS = (0, 70, 75, 150)


def parts(p: Problem, options: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse, and dq, dk, dv of attention over all keys, from parts of them."""
    keys = [(p.k[:, a:b], p.v[:, a:b]) for a, b in pairwise(CUTS)]
    found = [ops.attention_partial(p.q, *kv, **o) for kv, o in zip(keys, options, strict=True)]
    lse = torch.stack([x for _, x in found]).logsumexp(0)
    weights = [torch.exp(x - lse).nan_to_num(0).transpose(1, 2)[..., None] for _, x in found]
    out = sum(w * x for w, (x, _) in zip(weights, found, strict=True))
    delta = (out * p.dout.float()).sum(-1).transpose(1, 2) - p.dlse
    dq, dks, dvs = torch.zeros_like(p.q, dtype=torch.float32), [], []
    for kv, o in zip(keys, options, strict=True):
        found_dq, dk, dv = ops.attention_partial_backward(p.dout, p.q, *kv, lse, delta, **o)
        dq += found_dq
        dks.append(dk)
        dvs.append(dv)
    assert all(x.dtype == torch.float32 for x in (out, dq, *dks, *dvs))
    return out, lse, [dq, torch.cat(dks, 1), torch.cat(dvs, 1)]


def check_parts(
    backend: Backend, p: Problem, options: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    """The parts are no less accurate than `attention` of everything in the same dtype."""

    def call(*qkv: Tensor) -> Any:
        return ops.attention(*qkv, return_lse=True, **whole)

    out, lse, gradients = parts(p, options)
    exact, same = p.to(torch.float64).results(call), p.results(call)
    for name, got, one, true in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), same, exact, strict=True
    ):
        assert_as_accurate(name, got.to(one.dtype), one, true)
    if p.q.dtype != torch.float32:  # float32 sums are not rounded to 16 bits
        assert max_error(out, exact[0]) < max_error(same[0], exact[0])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_parts_of_keys(backend: Backend, head_dim: int) -> None:
    for dtype in backend.dtypes:
        p = problem((2, 33, 4, head_dim), (2, 150, 2, head_dim), dtype, backend)
        check_parts(backend, p, [{}] * 3, {})


def test_masks(backend: Backend) -> None:
    """Segments of packed documents; a part of which a query sees nothing."""
    p = problem((1, 150, 2, 64), (1, 150, 2, 64), backend.dtypes[-1], backend)
    ids = torch.arange(150, dtype=torch.int32, device=backend.device)[None] // 40
    images = torch.where(ids == 1, 0, -1).int()
    cut = [{"segment_ids": (ids, ids[:, a:b].contiguous())} for a, b in pairwise(CUTS)]
    check_parts(backend, p, cut, {"segment_ids": ids})
    last = {"causal": True, "segment_ids": ids, "image_ids": images}
    out, lse = ops.attention_partial(p.q, p.k, p.v, **last)
    wanted, wanted_lse = ops.attention(p.q, p.k, p.v, return_lse=True, **last)
    assert torch.equal(out.to(p.q.dtype), wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("heads_k", [1, 2])
def test_key_spans(backend: Backend, heads_k: int) -> None:
    """Any interval of keys for each query: of all lengths, far apart, empty; documents as spans."""
    p = problem((2, 90, 2, 64), (2, 150, heads_k, 64), backend.dtypes[-1], backend)
    ids = torch.arange(150, dtype=torch.int32, device=backend.device).expand(2, -1) // 40
    begin = ids[:, :90] * 40
    spans = torch.stack((begin, begin + 40), -1).int().contiguous()
    cut = [{"key_spans": (spans - a).clamp(0, b - a)} for a, b in pairwise(CUTS)]
    check_parts(backend, p, cut, {"segment_ids": (ids[:, :90].contiguous(), ids.contiguous())})


@pytest.mark.parametrize("heads_k", [1, 2])
def test_any_key_spans(backend: Backend, heads_k: int) -> None:
    """Before, beyond and outside of the keys, empty; keys that nobody sees are not read."""
    p = problem((2, 90, 2, 64), (2, 250, heads_k, 64), backend.dtypes[-1], backend)
    ends = torch.randint(-5, 260, (2, 90, 2), device=backend.device).int().sort(-1).values
    ends[:, 3], ends[:, 7, 1] = 300, ends[:, 7, 0]
    out, lse = ops.attention_partial(p.q, p.k, p.v, key_spans=ends)
    key = torch.arange(250, device=backend.device)
    seen = (key >= ends[..., :1]) & (key < ends[..., 1:])
    k = p.k.double().repeat_interleave(2 // heads_k, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", p.q.double(), k) / 8
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    blind = ~seen.any(-1)
    assert blind.any() and not out[blind].any()
    poisoned = p.k.clone(), p.v.clone()
    for x in poisoned:
        x[:, 192:] = torch.nan  # a whole number of tiles of all sizes
    low = ends.clamp(max=100)
    results = [ops.attention_partial(p.q, *kv, key_spans=low) for kv in (poisoned, (p.k, p.v))]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_key_spans_beyond_the_keys(backend: Backend) -> None:
    """All queries of a block see more keys than there are."""
    q, k = (torch.randn(1, n, 2, 64, device=backend.device).half() for n in (70, 90))
    spans = torch.tensor([-3, 500], dtype=torch.int32, device=backend.device).expand(1, 70, 2)
    found = ops.attention_partial(q, k, k, key_spans=spans.contiguous())
    for a, b in zip(found, ops.attention_partial(q, k, k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_key_spans_bad_input(backend: Backend) -> None:
    x = torch.zeros(1, 5, 2, 16, device=backend.device).half()
    spans = torch.zeros(1, 5, 2, dtype=torch.int32, device=backend.device)
    with pytest.raises(ValueError, match=r"key_spans must have shape"):
        ops.attention_partial(x, x, x, key_spans=spans[:, :4])
    with pytest.raises(TypeError, match="key_spans"):
        ops.attention_partial(x, x, x, key_spans=spans.long())
    with pytest.raises(ValueError, match="key_spans must not be given together"):
        ops.attention_partial(x, x, x, key_spans=spans, causal=True)


def test_packed(backend: Backend) -> None:
    q, k, dout = (torch.randn(90, 2, 64, device=backend.device).half() for _ in range(3))
    options = {"cu_seqlens_q": cu_seqlens([50, 0, 40], backend.device), "causal": True}
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    wanted, wanted_lse = ops.attention(*leaves, return_lse=True, **options)
    out, lse = ops.attention_partial(q, k, k, **options)
    torch.testing.assert_close(out.half(), wanted, rtol=2e-3, atol=1e-3)  # maybe another kernel
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    delta = (out * dout).sum(-1).transpose(0, 1)
    found = ops.attention_partial_backward(dout, q, k, k, lse, delta, **options)
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, dout), strict=True):
        torch.testing.assert_close(a.half(), b, rtol=1e-2, atol=1e-2)


def test_reference(backend: Backend) -> None:
    """float64: the gradient of a whole that consists of one part."""
    q, k, dout = (torch.randn(2, 5, 2, 8, device=backend.device).double() for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    wanted, lse = ops.attention(*leaves, return_lse=True, softcap=3.0)
    delta = (wanted.detach() * dout).sum(-1).transpose(1, 2)
    found = ops.attention_partial_backward(dout, q, k, k, lse.detach(), delta, softcap=3.0)
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_opcheck(backend: Backend) -> None:
    q, k = (torch.randn(1, n, 2, 16, device=backend.device).half() for n in (5, 6))
    options = (*(None,) * 8, 0, 0, -1, 0, 0.25, 0.0)
    torch.library.opcheck(torch.ops.vlmkernels.attention_partial.default, (q, k, k, *options))
    lse = torch.zeros(1, 2, 5, device=backend.device)
    arguments = (q, q, k, k, lse, lse, *options)
    torch.library.opcheck(torch.ops.vlmkernels.attention_partial_backward.default, arguments)


def test_bad_input(backend: Backend) -> None:
    x = torch.zeros(1, 5, 2, 64, device=backend.device).half()
    lse = torch.zeros(1, 2, 5, device=backend.device)
    with pytest.raises(ValueError, match="lse must have shape"):
        ops.attention_partial_backward(x, x, x, x, lse[..., :4], lse)
    with pytest.raises(ValueError, match="delta must have shape"):
        ops.attention_partial_backward(x, x, x, x, lse, lse[:, :1])
    with pytest.raises(TypeError, match="delta must be float32"):
        ops.attention_partial_backward(x, x, x, x, lse, lse.half())
