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


@pytest.mark.parametrize("window", [(0, -1), (70, -1), (200, 0)], ids=str)
@pytest.mark.parametrize("case", CASES[:4] + CASES[5:], ids=str)
def test_window_and_softcap(backend: Backend, case: tuple, window: tuple[int, int]) -> None:
    """Keys before the window of the first query are not read: whole blocks of them are NaN."""
    batch, seqlen_q, num_heads, num_heads_k, head_dim, max_seqlen, lengths = case
    dtype = backend.dtypes[-1]
    q = trapped((batch, seqlen_q, num_heads, head_dim), dtype, backend.device)
    heads = (num_heads_k, head_dim)
    k, v, cache_seqlens = caches(dtype, backend, batch, max_seqlen, *heads, lengths=lengths)
    options = {"window_size": window, "softcap": 3.0}
    for row, n in enumerate(lengths):
        first = max(0, n - seqlen_q - window[0]) // 384 * 384
        k[row, :first] = v[row, :first] = torch.nan
    found = ops.attention_decode(q, k, v, cache_seqlens, return_lse=True, **options)
    results = []
    for kind in (dtype, torch.float32, torch.float64):
        rows = []
        for b, n in enumerate(lengths):
            i = torch.arange(seqlen_q, device=q.device)[:, None] + n - seqlen_q
            j = torch.arange(n, device=q.device)
            seen = ((j >= i - window[0]) & (j <= i))[None]
            part = (x[b : b + 1, :n].nan_to_num(0).to(kind) for x in (k, v))
            rows.append(eager(q[b : b + 1].to(kind), *part, mask=seen, softcap=3.0))
        results.append([torch.cat(x) for x in zip(*rows, strict=True)])
    same, single, exact = results
    assert_as_accurate("out", found[0], same[0], exact[0], factor=3)
    # float32, but tanh from ex2.approx and a fast division: a few roundings of the softcap.
    assert_as_accurate("lse", found[1], single[1], exact[1], factor=6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages(backend: Backend, case: tuple) -> None:
    """The bits of a cache in one piece, from pages in any order; unused ones are NaN."""
    batch, seqlen_q, num_heads, num_heads_k, head_dim, max_seqlen, lengths = case
    dtype, page = backend.dtypes[-1], 32
    pages = -(-max_seqlen // page)
    q = trapped((batch, seqlen_q, num_heads, head_dim), dtype, backend.device)
    heads = (num_heads_k, head_dim)
    *whole, cache_seqlens = caches(dtype, backend, batch, pages * page, *heads, lengths=lengths)
    table = torch.randperm(batch * pages + 3, device=q.device)[: batch * pages].int()
    table = table.view(batch, pages)
    paged = []
    for x in whole:
        shape = (batch * pages + 3, page, *heads)
        paged.append(torch.full(shape, torch.nan, dtype=dtype, device=q.device))
        paged[-1][table.flatten().long()] = x.reshape(batch * pages, page, *heads)
    for row, n in enumerate(lengths):
        table[row, -(-n // page) :] = 2**30  # never looked up
    found = ops.attention_decode(q, *paged, cache_seqlens, block_table=table, return_lse=True)
    wanted = ops.attention_decode(q, *whole, cache_seqlens, return_lse=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_append(backend: Backend) -> None:
    """In place, rotated as rope does it; nothing but the new tokens changes."""
    for dtype in backend.dtypes:
        k, v = (torch.randn(2, 3, 2, 64, device=backend.device).to(dtype) for _ in range(2))
        q = torch.randn(2, 3, 4, 64, device=backend.device).to(dtype)
        k_cache, v_cache, lengths = caches(dtype, backend, 2, 40, 2, 64, lengths=[37, 5])
        before = k_cache.clone()
        angles = torch.rand(40, 32, device=q.device) * 6
        tables = {"cos": angles.cos(), "sin": angles.sin()}
        rotated = ops.kv_cache_append(k, v, k_cache, v_cache, lengths, q=q, **tables)
        with reference_ops():
            caches_too = [torch.zeros_like(x) for x in (k_cache, v_cache)]
            wanted = ops.kv_cache_append(k, v, *caches_too, lengths, q=q, **tables)
        torch.testing.assert_close(rotated, wanted)
        for row, n in enumerate((37, 5)):
            torch.testing.assert_close(k_cache[row, n : n + 3], caches_too[0][row, n : n + 3])
            assert torch.equal(v_cache[row, n : n + 3], v[row])
            for rest in (slice(n), slice(n + 3, None)):
                assert torch.equal(k_cache[row, rest].isnan(), before[row, rest].isnan())
        assert ops.kv_cache_append(k, v, k_cache, v_cache, lengths, q=q) is q
        assert torch.equal(k_cache[1, 5:8], k[1])


def test_append_compile_and_opcheck(backend: Backend) -> None:
    k = torch.randn(2, 1, 2, 32, device=backend.device).half()
    cache, _, lengths = caches(torch.float16, backend, 2, 16, 2, 32, lengths=[3, 9])
    cos = torch.rand(16, 16, device=k.device)

    def function(k: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        q = ops.kv_cache_append(k, k, cache, cache.clone(), lengths, q=k * 2, cos=cos, sin=cos)
        return q + cache[:, :3].sum(1, keepdim=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [f(k, cache.clone(), lengths) for f in (function, compiled)]
    assert torch.equal(*results)
    torch.library.opcheck(
        torch.ops.vlmkernels.kv_cache_append.default,
        (k, k, k, cache.clone(), cache.clone(), lengths, None, cos, cos, True, False),
    )


def test_append_bad_input(backend: Backend) -> None:
    k = torch.zeros(2, 3, 2, 64, device=backend.device).half()
    cache = torch.zeros(2, 16, 2, 64, device=backend.device).half()
    lengths = torch.tensor([13, 3], dtype=torch.int32, device=backend.device)
    cos = torch.zeros(16, 32, device=backend.device)
    table = torch.zeros(2, 1, dtype=torch.int32, device=backend.device)

    def call(**changed: object) -> None:
        inputs = {"k": k, "v": k, "k_cache": cache, "v_cache": cache, "cache_seqlens": lengths}
        ops.kv_cache_append(**(inputs | changed))

    call()
    for changed, error, message in [
        ({"v": k[:, :2]}, ValueError, "v must have the shape of k"),
        ({"k_cache": cache[:, :, :1], "v_cache": cache[:, :, :1]}, ValueError, "num_heads_k of k"),
        ({"k_cache": cache.float()}, TypeError, "k_cache must have the dtype"),
        ({"cache_seqlens": lengths.long()}, TypeError, "cache_seqlens must be int32"),
        ({"cos": cos[:15], "sin": cos[:15]}, ValueError, "cos must have shape"),
        ({"cos": cos[:, :5], "sin": cos[:, :5]}, ValueError, "rotary_dim a multiple of 16"),
        ({"cos": cos, "sin": cos.half()}, TypeError, "sin must have the dtype of cos"),
        ({"block_table": table[:1]}, ValueError, "block_table must have shape"),
    ]:
        with pytest.raises(error, match=message):
            call(**changed)
    pages = {"k_cache": cache[:, :9], "v_cache": cache[:, :9], "block_table": table}
    with pytest.raises(ValueError, match="pages of a multiple of 16 keys"):
        call(**pages)
    if backend.device == "cuda":
        return
    with pytest.raises(ValueError, match="cache_seqlens must be from 0 to max_seqlen"):
        call(cache_seqlens=lengths + 1)
    with pytest.raises(ValueError, match="block_table must hold pages from 0 to 1, got 7"):
        call(block_table=table + 7, cache_seqlens=lengths - 3)
