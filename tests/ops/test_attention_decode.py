"""attention_decode: the newest queries against a KV cache."""

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from tests.ops.attention_cases import eager, trapped
from vlmkernels import _core, ops
from vlmkernels.testing import assert_as_accurate, reference_ops

# batch, seqlen_q, num_heads, num_heads_k, head_dim, max_seqlen, cache_seqlens
CASES = [
    (2, 1, 4, 4, 64, 300, [300, 17]),  # several splits, most of them empty for the second row
    (3, 1, 14, 2, 128, 40, [0, 1, 40]),  # an empty cache; groups of 7
    (1, 1, 28, 4, 128, 700, [699]),
    (2, 5, 14, 2, 80, 260, [260, 3]),  # rows beyond one tile; fewer keys than queries
    (1, 3, 8, 1, 72, 150, [129]),
    (2, 70, 2, 2, 64, 200, [200, 33]),  # so many rows that the forward kernel takes them
]


def caches(
    dtype: torch.dtype, backend: Backend, batch: int, max_seqlen: int, *heads: int, lengths: list
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v with NaN beyond each row's length, and the lengths."""
    k, v = (trapped((batch, max_seqlen, *heads), dtype, backend.device) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = torch.nan
    return k, v, torch.tensor(lengths, dtype=torch.int32, device=backend.device)


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> list[Tensor]:
    parts = [
        eager(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal)
        for b, n in enumerate(lengths)
    ]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(backend: Backend, case: tuple, causal: bool) -> None:
    batch, seqlen_q, num_heads, num_heads_k, head_dim, max_seqlen, lengths = case
    for dtype in backend.dtypes:
        q = trapped((batch, seqlen_q, num_heads, head_dim), dtype, backend.device)
        k, v, cache_seqlens = caches(
            dtype, backend, batch, max_seqlen, num_heads_k, head_dim, lengths=lengths
        )
        got = ops.attention_decode(q, k, v, cache_seqlens, causal=causal, return_lse=True)
        same = by_hand(q, k, v, lengths, causal)
        same[1] = by_hand(q.float(), k.float(), v.float(), lengths, causal)[1]
        exact = by_hand(q.double(), k.double(), v.double(), lengths, causal)
        for name, *values in zip(("out", "lse"), got, same, exact, strict=True):
            assert_as_accurate(f"{name} {dtype}", *values)


@pytest.mark.parametrize("head_dim", [8, 32, 72, 80, 88, 96, 104, 112, 160, 192, 256])
def test_head_dims(backend: Backend, head_dim: int) -> None:
    test_accuracy(backend, (2, 1, 4, 2, head_dim, 140, [140, 21]), True)


def test_exact(backend: Backend) -> None:
    """q = 0: the mean of the valid values, exact for 128 keys in several splits."""
    for dtype in backend.dtypes:
        values = torch.randint(-8, 9, (1, 300, 1, 64), device=backend.device).to(dtype)
        values[:, 256:] = torch.nan
        length = torch.tensor([256], dtype=torch.int32, device=backend.device)
        q = torch.zeros(1, 1, 7, 64, dtype=dtype, device=backend.device)
        out = ops.attention_decode(q, values, values, length)
        expected = values[:, :256].double().mean(1, keepdim=True).to(dtype)
        assert torch.equal(out, expected.expand_as(out))


def test_a_cache_that_grows(backend: Backend) -> None:
    """Token by token, the rows of one causal attention."""
    q, k, v = (torch.randn(1, 12, h, 64, device=backend.device).half() for h in (4, 2, 2))
    whole = ops.attention(q, k, v, causal=True)
    for n in range(1, 13):
        length = torch.tensor([n], dtype=torch.int32, device=backend.device)
        torch.testing.assert_close(
            ops.attention_decode(q[:, n - 1 : n], k, v, length), whole[:, n - 1 : n]
        )


def test_empty(backend: Backend) -> None:
    for batch, seqlen_q, max_seqlen in [(0, 1, 8), (2, 0, 8), (2, 1, 0)]:
        q = torch.randn(batch, seqlen_q, 4, 64, device=backend.device).half()
        k, v, lengths = caches(
            torch.float16, backend, batch, max_seqlen, 2, 64, lengths=[0] * batch
        )
        out, lse = ops.attention_decode(q, k, v, lengths, return_lse=True)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((batch, 4, seqlen_q), -torch.inf, device=q.device))


def test_the_same_bits_every_time(backend: Backend) -> None:
    """And a row's result does not depend on its neighbours: the splits are a matter of sizes."""
    longest, dtype = 300 if backend.small else 3000, backend.dtypes[0]
    q = torch.randn(2, 1, 4, 80, device=backend.device).to(dtype)
    k, v, lengths = caches(dtype, backend, 2, longest, 2, 80, lengths=[longest, 290])

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        return ops.attention_decode(q[rows], k[rows], v[rows], lengths[rows], return_lse=True)

    out, lse = run(slice(2))
    same = [run(slice(2))]
    lengths[0] = 17
    same.append(tuple(x[1:] for x in run(slice(2))))
    if backend.name == "cpu":  # on CUDA the batch says how many splits fill the GPU
        same.append(run(slice(1, 2)))
    for again, again_lse in same:
        assert torch.equal(again, out[-len(again) :])
        assert torch.equal(again_lse, lse[-len(again) :])


def test_compile_and_opcheck(backend: Backend) -> None:
    q = torch.randn(2, 1, 4, 32, device=backend.device).half()
    k, v, lengths = caches(torch.float16, backend, 2, 10, 2, 32, lengths=[10, 4])

    def function(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ops.attention_decode(q * 2, k, v, lengths + 0) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lengths), function(q, k, v, lengths))
    torch.library.opcheck(
        torch.ops.vlmkernels.attention_decode.default, (q, k, v, lengths, None, -1, 0, 0.2, 0.0)
    )


def test_float64() -> None:
    q = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    cache = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    got = ops.attention_decode(q, cache, cache, lengths)
    expected = by_hand(q, cache, cache, [2, 5], True)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_autocast(backend: Backend) -> None:
    q = torch.randn(2, 1, 4, 32, device=backend.device)
    k, v, lengths = caches(torch.float32, backend, 2, 10, 2, 32, lengths=[10, 4])
    expected = ops.attention_decode(q.bfloat16(), k.bfloat16(), v.bfloat16(), lengths)
    with torch.autocast(backend.device, torch.bfloat16):
        assert torch.equal(ops.attention_decode(q, k.bfloat16(), v, lengths), expected)


def test_reference_clamps() -> None:
    """As the CUDA kernel does; lengths that the CPU kernel refuses."""
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 5, 2, 8)
    with reference_ops():
        got, expected = (
            ops.attention_decode(q, cache, cache, torch.tensor(lengths, dtype=torch.int32))
            for lengths in ([-2, 9], [0, 5])
        )
    assert torch.equal(got, expected)


def test_no_gradient() -> None:
    """An input that requires a gradient is refused, unless gradients are off."""
    lengths = torch.tensor([5], dtype=torch.int32)
    for i, name in enumerate(("q", "k_cache", "v_cache")):
        tensors = [torch.randn(1, n, 2, 8) for n in (1, 5, 5)]
        tensors[i].requires_grad_()
        with pytest.raises(ValueError, match=f"attention_decode: {name} has no gradient"):
            ops.attention_decode(*tensors, lengths)
        with torch.no_grad():
            assert not ops.attention_decode(*tensors, lengths).requires_grad


def test_bad_workspace(backend: Backend) -> None:
    """What the core is given beside the caller's tensors is checked like those."""
    q = torch.zeros(2, 1, 4, 64, device=backend.device).half()
    k, v, lengths = caches(torch.float16, backend, 2, 8, 2, 64, lengths=[8, 3])
    partial_out = torch.zeros(3, *q.shape, device=backend.device)
    partial_lse = torch.zeros(3, 2, 4, 1, device=backend.device)
    lse = torch.zeros(2, 4, 1, device=backend.device)

    def call(partial_out: Tensor, partial_lse: Tensor) -> None:
        tensors = (q, k, v, lengths, None, torch.empty_like(q), lse, partial_out, partial_lse)
        assert _core.C.attention_decode(*tensors, -1, 0, 0.125, 0.0)

    call(partial_out, partial_lse)
    for arguments, error, message in [
        ((partial_out[:0], partial_lse), ValueError, "partial_out must hold a split"),
        ((partial_out[:, :1], partial_lse), ValueError, "partial_out must have shape"),
        ((partial_out[0], partial_lse), ValueError, "partial_out must have shape"),
        ((partial_out, partial_lse[:2]), ValueError, "partial_lse must have shape"),
        ((partial_out.half(), partial_lse), TypeError, "partial_out must be float32"),
        ((partial_out, partial_lse.double()), TypeError, "partial_lse must be float32"),
    ]:
        with pytest.raises(error, match=message):
            call(*arguments)


def test_bad_input(backend: Backend) -> None:
    q = torch.zeros(2, 1, 4, 64, device=backend.device).half()
    cache = torch.zeros(2, 8, 2, 64, device=backend.device).half()
    lengths = torch.tensor([8, 3], dtype=torch.int32, device=backend.device)
    for arguments, error, message in [
        ((q[0], cache, cache, lengths), ValueError, "q must have shape"),
        ((q, cache[..., :32], cache, lengths), ValueError, "k_cache must have the head_dim of q"),
        ((q, cache, cache[:, :5], lengths), ValueError, "v_cache must have the shape of k_cache"),
        ((q, cache.bfloat16(), cache, lengths), TypeError, "k_cache must have the dtype of q"),
        ((q, cache, cache, lengths.long()), TypeError, "cache_seqlens must be int32, got int64"),
        ((q, cache, cache, lengths[:1]), ValueError, r"must have shape \(batch,\) = \(2,\)"),
    ]:
        with pytest.raises(error, match=message):
            ops.attention_decode(*arguments)
    if backend.device == "cuda":  # the values would have to be fetched from the GPU
        return
    for wrong in ([9, 3], [-1, 3]):
        with pytest.raises(ValueError, match=r"cache_seqlens must be from 0 to max_seqlen \(8\)"):
            ops.attention_decode(q, cache, cache, torch.tensor(wrong, dtype=torch.int32))
