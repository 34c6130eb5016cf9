"""attention, packed: sequences of any length side by side, told apart by cu_seqlens."""

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from tests.ops.attention_cases import check, cu_seqlens, eager_packed, problem
from vlmkernels import ops

# Windows, images of very different size, single tokens, empty sequences anywhere, one sequence.
LENGTHS = [[64, 64, 64], [1, 150, 7], [0, 3, 0, 0, 66, 0], [113], [1, 1, 1, 1]]


def packed(cu_q: Tensor, cu_k: Tensor | None = None, causal: bool = False):
    return lambda q, k, v: ops.attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal, return_lse=True
    )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_self_attention(backend: Backend, lengths: list[int], causal: bool) -> None:
    cu = cu_seqlens(lengths, backend.device)
    for dtype in backend.dtypes:
        p = problem((sum(lengths), 2, 80), (sum(lengths), 1, 80), dtype, backend)
        check(
            p,
            packed(cu, causal=causal),
            lambda *qkv: eager_packed(*qkv, lengths, lengths, causal),
            f"{lengths} {dtype}",
        )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_cross_attention(backend: Backend, causal: bool) -> None:
    lengths_q, lengths_k = [5, 0, 70, 33, 3], [66, 4, 1, 0, 90]
    cu_q, cu_k = (cu_seqlens(x, backend.device) for x in (lengths_q, lengths_k))
    for head_dim in (72, 128):
        p = problem(
            (sum(lengths_q), 4, head_dim), (sum(lengths_k), 2, head_dim), torch.float16, backend
        )
        check(
            p,
            packed(cu_q, cu_k, causal),
            lambda *qkv: eager_packed(*qkv, lengths_q, lengths_k, causal),
        )


def test_packed_is_dense(backend: Backend) -> None:
    """The same bits as each sequence alone, and as a dense batch, gradients included."""
    p = problem((3, 70, 4, 64), (3, 70, 2, 64), torch.bfloat16, backend)
    dense = p.results(lambda *qkv: ops.attention(*qkv, causal=True, return_lse=True))
    flat = type(p)(
        *(x.flatten(0, 1) for x in (p.q, p.k, p.v, p.dout)), p.dlse.transpose(0, 1).flatten(1)
    )
    out, lse, *gradients = flat.results(packed(cu_seqlens([70] * 3, backend.device), causal=True))
    assert torch.equal(lse, dense[1].transpose(0, 1).flatten(1))
    pairs = zip([out, *gradients], [dense[0], *dense[2:]], strict=True)
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in pairs)


def test_no_tokens(backend: Backend) -> None:
    for cu in (cu_seqlens([], backend.device), cu_seqlens([0, 0], backend.device)):
        p = problem((0, 2, 64), (0, 2, 64), torch.float16, backend)
        out, lse, *gradients = p.results(packed(cu))
        assert out.shape == (0, 2, 64) and lse.shape == (2, 0)
        assert all(x.shape == (0, 2, 64) for x in gradients)


def test_sequences_see_themselves_only(backend: Backend) -> None:
    """A sequence of NaN leaves its neighbours alone, forward and backward."""
    p = problem((60, 2, 64), (60, 2, 64), torch.bfloat16, backend)
    for x in (p.q, p.k, p.v, p.dout):
        x[20:30] = torch.nan
    cu = cu_seqlens([20, 10, 30], backend.device)
    out, _, *gradients = p.results(packed(cu))
    for x in (out, *gradients):
        assert x[20:30].isnan().all() and x[:20].isfinite().all() and x[30:].isfinite().all()


def test_max_seqlen(backend: Backend) -> None:
    """It may be larger than needed, and is found when not given."""
    x = torch.randn(30, 2, 32, device=backend.device).half()
    cu = cu_seqlens([3, 27], backend.device)
    expected = ops.attention(x, x, x, cu_seqlens_q=cu)
    for options in (
        {"max_seqlen_q": 27},
        {"max_seqlen_q": 300, "max_seqlen_k": 28},
        {"max_seqlen_q": 2**31 - 1},
    ):
        assert torch.equal(ops.attention(x, x, x, cu_seqlens_q=cu, **options), expected)


def test_compile(backend: Backend) -> None:
    x = torch.randn(30, 2, 32, device=backend.device).half()
    cu = cu_seqlens([3, 27], backend.device)

    def function(x: Tensor, cu: Tensor, max_seqlen: int | None) -> Tensor:
        return ops.attention(x * 2, x, x, cu_seqlens_q=cu, max_seqlen_q=max_seqlen) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for max_seqlen in (27, None):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = function(a, cu, max_seqlen), compiled(b, cu, max_seqlen)
        expected.sum().backward()
        got.sum().backward()
        assert torch.equal(got, expected) and torch.equal(a.grad, b.grad)


def test_opcheck(backend: Backend) -> None:
    qkv = [torch.randn(9, 2, 16, device=backend.device).half().requires_grad_() for _ in range(3)]
    cu = cu_seqlens([3, 6], backend.device)
    torch.library.opcheck(
        torch.ops.vlmkernels.attention.default,
        (*qkv, None, cu, cu, *(None,) * 5, 6, 6, -1, -1, 0.25, 0.0),
    )


def test_gradcheck() -> None:
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed(cu_seqlens([3, 0, 4], "cpu"), causal=True), (x, x, x))


def test_bad_input(backend: Backend) -> None:
    x = torch.zeros(9, 2, 64, device=backend.device).half()

    def call(lengths: list[int], dtype: torch.dtype = torch.int32, **options: object) -> object:
        cu = torch.tensor(lengths, dtype=dtype, device=backend.device)
        return ops.attention(x, x, x, cu_seqlens_q=cu, **options)

    for dtype in (torch.complex64, torch.float32, torch.bool):
        with pytest.raises(TypeError, match="cu_seqlens_q must be int32, got"):
            call([0, float("inf")], dtype=dtype)
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32, got int64"):
        call([0, 9], torch.int64)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have shape \(batch \+ 1,\)"):
        call([[0, 9]], max_seqlen_q=9)
    with pytest.raises(ValueError, match="cu_seqlens_k must have the shape of cu_seqlens_q"):
        call([0, 9], cu_seqlens_k=cu_seqlens([4, 5], backend.device))
    with pytest.raises(ValueError, match="cu_seqlens_k is given, cu_seqlens_q is not"):
        ops.attention(x, x, x, cu_seqlens_k=cu_seqlens([9], backend.device))
    with pytest.raises(ValueError, match="q must have shape"):
        ops.attention(x[None], x, x, cu_seqlens_q=cu_seqlens([9], backend.device), max_seqlen_q=9)
    if backend.device == "cuda":  # the values would have to be fetched from the GPU
        return
    for lengths, message in [
        ([1, 9], "cu_seqlens_q must start at 0, got 1"),
        ([0, 5, 4, 9], "cu_seqlens_q must not decrease, got 5, 4"),
        ([0, 8], r"cu_seqlens_q must end at the num_tokens of q \(9\), got 8"),
        ([0, 10], r"cu_seqlens_q must end at the num_tokens of q \(9\), got 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(lengths)
    with pytest.raises(ValueError, match=r"no sequence longer than max_seqlen \(4\), got 9"):
        call([0, 9], max_seqlen_q=4)
