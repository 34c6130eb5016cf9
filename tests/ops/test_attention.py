"""attention, dense: exact, accurate, gradients, compile, dispatcher, memory, bad input."""

import pytest
import torch

from tests.conftest import Backend
from tests.ops.attention_cases import Problem, check_dense, problem
from vlmkernels import ops

HEAD_DIMS = [8, 16, 32, 40, 64, 72, 80, 88, 96, 104, 112, 120, 128, 160, 192, 248, 256]
# seqlen_q, seqlen_k: around the tiles, one much longer than the other, both ways.
LENGTHS = [(1, 1), (7, 7), (17, 64), (64, 17), (65, 65), (113, 203), (1, 129), (129, 1), (130, 129)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend: Backend, head_dim: int) -> None:
    for dtype in backend.dtypes:
        check_dense(backend, (1, 37, 70, 2, 1, head_dim), True, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(backend: Backend, lengths: tuple[int, int], causal: bool) -> None:
    for head_dim in (64, 80):
        check_dense(backend, (2, *lengths, 2, 2, head_dim), causal, backend.dtypes[-1])


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (28, 4)], ids=str)
def test_grouped_queries(backend: Backend, heads: tuple[int, int]) -> None:
    check_dense(backend, (2, 19, 40, *heads, 128), True, backend.dtypes[-1])


@pytest.mark.parametrize("softmax_scale", [0.01, 1.0])
def test_softmax_scale(backend: Backend, softmax_scale: float) -> None:
    for dtype in backend.dtypes:
        check_dense(backend, (1, 20, 33, 2, 1, 64), False, dtype, softmax_scale)


def test_long(backend: Backend) -> None:
    """Several blocks on both sides, with and without a mask."""
    seqlen = 300 if backend.small else 700
    for dtype in backend.dtypes:
        check_dense(backend, (1, seqlen, seqlen + 33, 2, 1, 128), True, dtype)


def select_keys(
    choice: torch.Tensor, num_keys: int, backend: Backend, dtype: torch.dtype
) -> Problem:
    """Query i gives score 0 to key choice[i] and -256 to any other: a softmax that is exactly 1
    at the choice. All values are small integers, so every sum is exact in every dtype."""
    num_queries, head_dim = len(choice), 128
    eye = torch.eye(num_keys, head_dim)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape).float()

    tensors = [
        (16 - 16 * eye[choice])[None, :, None],
        (-16 * eye)[None, :, None],
        integers(1, num_keys, 1, head_dim),
        integers(1, num_queries, 1, head_dim),
    ]
    q, k, v, dout = (x.to(backend.device, dtype) for x in tensors)
    return Problem(q, k, v, dout, integers(1, 1, num_queries).to(backend.device))


@pytest.mark.parametrize("num_keys", [1, 16, 63, 113, 128])
def test_exact(backend: Backend, num_keys: int) -> None:
    """Attention that picks one key: out, lse and all gradients, with no tolerance."""
    for dtype in backend.dtypes:
        choice = torch.randint(0, num_keys, (90,))
        p = select_keys(choice, num_keys, backend, dtype)
        out, lse, dq, dk, dv = p.results(
            lambda *qkv: ops.attention(*qkv, softmax_scale=1.0, return_lse=True)
        )
        choice = choice.to(backend.device)
        assert torch.equal(out, p.v[:, choice])
        assert torch.equal(lse, torch.zeros_like(lse))
        # p = 1 at the choice: ds = dout v - out dout + dlse = dlse there.
        dlse = p.dlse.view(1, -1, 1, 1).to(dtype)
        assert torch.equal(dq, dlse * p.k[:, choice])
        zero = torch.zeros_like(p.k).float()
        assert torch.equal(dk.float(), zero.index_add(1, choice, (dlse * p.q).float()))
        assert torch.equal(dv.float(), zero.index_add(1, choice, p.dout.float()))


def test_uniform(backend: Backend) -> None:
    """q = 0: the mean of the values, exact for 64 keys; lse = log 64."""
    for dtype in backend.dtypes:
        v = torch.randint(-8, 9, (2, 64, 2, 72), device=backend.device).to(dtype)
        out, lse = ops.attention(torch.zeros_like(v)[:, :5], v, v, return_lse=True)
        assert torch.equal(out, v.double().mean(1, keepdim=True).to(dtype).expand_as(out))
        torch.testing.assert_close(lse, torch.full_like(lse, 64).log())


def test_queries_that_see_no_key(backend: Backend) -> None:
    """Bottom-right causal with more queries than keys: out 0, lse -inf, gradient 0, never NaN."""
    for seqlen_k in (0, 3):
        p = problem((1, 70, 2, 64), (1, seqlen_k, 1, 64), backend.dtypes[-1], backend)
        blind = 70 - seqlen_k
        out, lse, dq, dk, dv = p.results(
            lambda *qkv: ops.attention(*qkv, causal=True, return_lse=True)
        )
        assert torch.equal(out[:, :blind], torch.zeros_like(out[:, :blind]))
        assert bool((lse[..., :blind] == -torch.inf).all()) and lse[..., blind:].isfinite().all()
        assert torch.equal(dq[:, :blind], torch.zeros_like(dq[:, :blind]))
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_empty(backend: Backend) -> None:
    for batch, seqlen_q, seqlen_k in [(0, 4, 4), (2, 0, 4), (2, 0, 0)]:
        p = problem((batch, seqlen_q, 2, 64), (batch, seqlen_k, 2, 64), torch.float16, backend)
        out, lse, dq, dk, dv = p.results(lambda *qkv: ops.attention(*qkv, return_lse=True))
        assert out.shape == dq.shape == p.q.shape and lse.shape == (batch, 2, seqlen_q)
        assert all(torch.equal(x, torch.zeros_like(p.k)) for x in (dk, dv))


def test_the_same_bits_every_time(backend: Backend) -> None:
    p = problem((2, 150, 4, 80), (2, 140, 2, 80), torch.bfloat16, backend)

    def run(p: Problem) -> list[torch.Tensor]:
        return p.results(lambda *qkv: ops.attention(*qkv, causal=True, return_lse=True))

    first, second = run(p), run(p)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(Problem(*(x[1:] for x in (p.q, p.k, p.v, p.dout, p.dlse))))
    assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))


def test_layouts(backend: Backend) -> None:
    """Slices of a fused qkv, heads before tokens, expanded values: as their contiguous copies."""
    for head_dim in (64, 72):
        qkv = torch.randn(2, 21, 3, 4, head_dim, device=backend.device).half()
        heads_first = torch.randn(2, 4, 21, head_dim, device=backend.device).half()
        for q, k, v in [
            qkv.unbind(2),
            (heads_first.transpose(1, 2), qkv[:, :, 0], qkv[:1, :, 1].expand(2, -1, -1, -1)),
            (qkv[:, ::3, 0], qkv[:, 4:, 1], qkv[:, 4:, 2]),
        ]:
            copies = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
            assert torch.equal(ops.attention(q, k, v), ops.attention(*copies))


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Rows of k that lie gigabytes apart (of which only a few pages are ever touched)."""
    stride = 2**29 + 8
    storage = torch.empty(4 * stride + 64, dtype=torch.bfloat16, device=backend.device)
    k = storage.as_strided((1, 5, 1, 64), (0, stride, 64, 1))
    k.copy_(torch.randn(1, 5, 1, 64))
    q = torch.randn(1, 3, 1, 64, device=backend.device).bfloat16()
    assert torch.equal(ops.attention(q, k, k), ops.attention(q, k.clone(), k.clone()))


def test_gradient_of_a_sum(backend: Backend) -> None:
    """The gradient of a sum has stride 0; one of lse alone comes without one of out."""
    q = torch.randn(1, 9, 2, 32, device=backend.device).bfloat16().requires_grad_()
    (dq,) = torch.autograd.grad(ops.attention(q, q.detach(), q.detach()).sum(), q)
    out, lse = ops.attention(q, q.detach(), q.detach(), return_lse=True)
    (expected,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    assert torch.equal(dq, expected)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    assert dq.isfinite().all() and dq.abs().sum() > 0


def test_gradcheck() -> None:
    q, k, v = (
        torch.randn(2, n, h, 8, dtype=torch.float64, requires_grad=True)
        for n, h in [(3, 4), (5, 2), (5, 2)]
    )
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda *qkv, causal=causal: ops.attention(*qkv, causal=causal, return_lse=True),
            (q, k, v),
        )


def test_compile(backend: Backend) -> None:
    p = problem((2, 9, 4, 40), (2, 13, 2, 40), torch.bfloat16, backend)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = ops.attention(q * 2, k, v, causal=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(p.results(compiled), p.results(function), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_autocast(backend: Backend) -> None:
    """float32, or a mixture, goes to the kernel in the dtype of autocast, as SDPA does it."""
    q, k, v = (torch.randn(1, 9, 2, 32, device=backend.device) for _ in range(3))
    q.requires_grad_()
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    (dq,) = torch.autograd.grad(expected.sum(), q)
    with torch.autocast(backend.device, torch.bfloat16):
        mixed = ops.attention(q, k.bfloat16(), v)
        exact = ops.attention(q.double(), k.double(), v.double())
    assert exact.dtype == torch.float64
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, expected)
    assert torch.equal(torch.autograd.grad(mixed.sum(), q)[0], dq)
    with torch.autocast("cpu", torch.bfloat16):  # has no meta tensors
        assert ops.attention(*(x.to("meta") for x in (q, k, v))).dtype == torch.float32


def test_opcheck(backend: Backend) -> None:
    p = problem((1, 5, 4, 16), (1, 6, 2, 16), torch.bfloat16, backend)
    leaves = tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    options = (*(None,) * 8, 0, 0, -1, 0, 0.25, 0.0)
    torch.library.opcheck(torch.ops.vlmkernels.attention.default, (*leaves, *options))
    out, lse = torch.ops.vlmkernels.attention(p.q, p.k, p.v, *options)
    arguments = (p.dout.contiguous(), p.dlse, p.q, p.k, p.v, out, lse, False, *options)
    torch.library.opcheck(torch.ops.vlmkernels.attention_backward.default, arguments)


def test_bad_input(backend: Backend) -> None:
    def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=backend.device)

    q, kv = heads(2, 5, 4, 64), heads(2, 7, 2, 64)
    for arguments, error, message in [
        ((q[0], kv, kv), ValueError, r"q must have shape .*, got \(5, 4, 64\)"),
        ((q, kv[0], kv), ValueError, r"k must have shape .*, got \(7, 2, 64\)"),
        ((heads(3, 4), kv, kv), ValueError, r"q must have shape .*, got \(3, 4\)"),
        ((heads(2, 5, 4, 84), kv, kv), ValueError, "multiple of 8 from 8 to 256, got 84"),
        ((heads(2, 5, 4, 264), kv, kv), ValueError, "multiple of 8 from 8 to 256, got 264"),
        ((q, heads(2, 7, 2, 72), kv), ValueError, r"k must have the head_dim of q \(64\), got 72"),
        ((heads(2, 5, 3, 64), kv, kv), ValueError, r"divides num_heads \(3\), got 2"),
        ((q, heads(3, 7, 2, 64), kv), ValueError, r"k must have the batch of q \(2\), got 3"),
        ((q, kv, heads(2, 6, 2, 64)), ValueError, "v must have the shape of k"),
        ((heads(2, 5, 4, 128)[..., ::2], kv, kv), ValueError, "q must have a contiguous last"),
        ((q.half(), kv, kv), TypeError, "k must have the dtype of q"),
        ((q.int(), kv, kv), TypeError, "q must be float64, .* got int32"),
    ]:
        with pytest.raises(error, match=message):
            ops.attention(*arguments)
    for softmax_scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="softmax_scale must be positive and finite"):
            ops.attention(q, kv, kv, softmax_scale=softmax_scale)


def test_misaligned(backend: Backend) -> None:
    """CUDA kernels read 16 bytes at a time and say so; the CPU takes any offset."""
    storage = torch.randn(3 * 2 * 64 + 1, device=backend.device).half()
    x = storage[1:].view(1, 3, 2, 64)
    q = x.clone().requires_grad_()
    out = ops.attention(q, x.clone(), x.clone())  # dout, which the caller has no say in, is copied
    (expected,) = torch.autograd.grad(out, q, x.clone(), retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, q, x)[0], expected)
    if backend.name == "cpu":
        assert torch.equal(ops.attention(x, x, x), ops.attention(*[x.clone()] * 3))
        return
    with pytest.raises(ValueError, match="q must start at a multiple of 16 bytes"):
        ops.attention(x, x, x)
    odd = torch.zeros(1, 3, 2, 68, device=backend.device).half()[..., :64]
    with pytest.raises(ValueError, match="q must have strides that are multiples of 8"):
        ops.attention(odd, odd, odd)
