"""attention with windows, softcap, bias, segments and images, alone and together."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend
from tests.ops.attention_cases import Masks, Problem, check_masked, cu_seqlens, problem
from vlmkernels import ops
from vlmkernels.testing import reference_ops

WINDOWS = [(0, 0), (3, 0), (70, -1), (-1, 9), (20, 33), (500, 500)]
# batch or 1, num_heads or 1
BIASES = [(1, 1), (2, 1), (1, 3), (2, 3)]


def dense(
    backend: Backend,
    lengths: tuple[int, int],
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    batch: int = 2,
    dtype: torch.dtype | None = None,
) -> Problem:
    return problem(
        (batch, lengths[0], heads[0], head_dim),
        (batch, lengths[1], heads[1], head_dim),
        *(dtype or backend.dtypes[-1], backend),
    )


def with_bias(p: Problem, batch: int, heads: int, dtype: torch.dtype | None = None) -> Problem:
    """A bias in a storage of NaN, with rows at odd offsets."""
    seqlen_q, seqlen_k = p.q.shape[1], p.k.shape[1]
    storage = torch.full((batch, heads, seqlen_q + 1, seqlen_k + 3), torch.nan)
    storage[..., 1:, 1:-2] = torch.randn(batch, heads, seqlen_q, seqlen_k)
    storage = storage.to(p.q.device, dtype or p.q.dtype)
    return replace(p, bias=storage[..., 1:, 1:-2])


def token_ids(ids: list[list[int]], seqlen_q: int, device: str) -> tuple[Tensor, Tensor]:
    """Of the keys, and of the last seqlen_q of them."""
    of_k = torch.tensor(ids, dtype=torch.int32, device=device)
    return of_k[:, of_k.shape[1] - seqlen_q :].contiguous(), of_k


def documents(seqlen: int, lengths: list[int]) -> list[int]:
    found = [i for i, n in enumerate(lengths) for _ in range(n)]
    return (found + [len(lengths)] * seqlen)[:seqlen]


def images(seqlen: int, spans: list[tuple[int, int]]) -> list[int]:
    found = [-1] * seqlen
    for image, (begin, end) in enumerate(spans):
        found[begin:end] = [image] * (min(end, seqlen) - begin)
    return found


def vlm_masks(backend: Backend, seqlen_q: int, seqlen_k: int, **options: object) -> Masks:
    """Two rows of packed documents with images, one of them across a tile, one at the very end."""
    device = backend.device
    segments = [documents(seqlen_k, [30, 1, 65]), documents(seqlen_k, [seqlen_k])]
    spans = [[(3, 12), (33, 80), (97, 110)], [(0, 70), (90, 91), (seqlen_k - 9, seqlen_k)]]
    return Masks(
        segment_ids=token_ids(segments, seqlen_q, device),
        image_ids=token_ids([images(seqlen_k, x) for x in spans], seqlen_q, device),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(backend: Backend, window: tuple[int, int]) -> None:
    for lengths in [(70, 70), (33, 150), (150, 33)]:
        check_masked(dense(backend, lengths, batch=1), Masks(window), f"{lengths}")


@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 104, 128, 192, 256])
def test_everything(backend: Backend, head_dim: int) -> None:
    """Window, segments, images, softcap and bias at once."""
    p = with_bias(dense(backend, (100, 120), head_dim=head_dim), 1, 2)
    check_masked(p, vlm_masks(backend, 100, 120, window_size=(40, 0), softcap=4.0))


@pytest.mark.parametrize(
    "lengths", [(1, 1), (64, 128), (239, 1), (113, 203), (108, 256), (799, 3)], ids=str
)
def test_lengths(backend: Backend, lengths: tuple[int, int]) -> None:
    for dtype in backend.dtypes[-1:] if backend.small else backend.dtypes:
        p = dense(backend, lengths, (1, 1), batch=1, dtype=dtype)
        check_masked(with_bias(p, 1, 1), Masks((50, 20)), f"{lengths} {dtype}")


def test_long(backend: Backend) -> None:
    """Over more tiles than one look at 32 of them."""
    if backend.small:
        p = dense(backend, (70, 1100), (1, 1), batch=1)
    else:
        p = dense(backend, (1024, 1023), (1, 1), batch=1)
    check_masked(p, Masks((600, 3)))
    ids = documents(p.k.shape[1], [17] * 50)
    check_masked(p, Masks(segment_ids=long_ids(p, ids), image_ids=long_ids(p, ids)))


def long_ids(p: Problem, ids: list[int]) -> tuple[Tensor, Tensor]:
    seqlen_q, seqlen_k = p.q.shape[1], p.k.shape[1]
    of_k = torch.tensor([ids], dtype=torch.int32, device=p.q.device)
    of_q = torch.cat([of_k[:, :1].expand(1, max(seqlen_q - seqlen_k, 0)), of_k[:, -seqlen_q:]], 1)
    return of_q.contiguous(), of_k


@pytest.mark.parametrize("heads", [(4, 4), (3, 1), (7, 1), (8, 1)], ids=str)
def test_grouped_queries(backend: Backend, heads: tuple[int, int]) -> None:
    p = with_bias(dense(backend, (40, 50), heads), 2, heads[0])
    check_masked(p, Masks((30, 4)))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(backend: Backend, softcap: float) -> None:
    for dtype in backend.dtypes:
        p = dense(backend, (70, 90), batch=1, dtype=dtype)
        check_masked(p, Masks((-1, 0), softcap), f"{dtype}", softmax_scale=0.5)


@pytest.mark.parametrize("broadcast", BIASES, ids=str)
def test_bias(backend: Backend, broadcast: tuple[int, int]) -> None:
    for dtype in backend.dtypes:
        p = dense(backend, (70, 90), (3, 1), dtype=dtype)
        check_masked(with_bias(p, *broadcast), Masks(), f"{dtype}")
        check_masked(with_bias(p, *broadcast, torch.float32), Masks((-1, 0)), f"{dtype} float32")


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_bias_of_minus_infinity(backend: Backend, dtype: torch.dtype | None) -> None:
    """A mask as people pass it: -inf hides a key, a row of it gives 0."""
    p = with_bias(dense(backend, (40, 70), dtype=dtype), 2, 1)
    assert p.bias is not None
    p.bias.masked_fill_(torch.rand(p.bias.shape, device=p.bias.device) < 0.3, -torch.inf)
    p.bias[0, 0, 7] = -torch.inf
    out, lse, *gradients = p.results(lambda *x: ops.attention(*x[:3], bias=x[3], return_lse=True))
    assert torch.equal(out[0, 7], torch.zeros_like(out[0, 7]))
    assert (lse[0, :, 7] == -torch.inf).all()
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_segments(backend: Backend) -> None:
    for lengths in [(110, 110), (40, 120)]:
        masks = vlm_masks(backend, *lengths)
        p = dense(backend, lengths)
        check_masked(p, Masks(segment_ids=masks.segment_ids), f"{lengths}")


def test_images(backend: Backend) -> None:
    """Causal text, images that see all of themselves, with and without a window or documents."""
    for lengths in [(110, 110), (40, 120)]:
        masks = vlm_masks(backend, *lengths, window_size=(-1, 0))
        p = dense(backend, lengths)
        check_masked(p, masks, f"{lengths}")
        check_masked(p, replace(masks, segment_ids=None, window_size=(5, 0)), f"{lengths} window")


def test_segments_are_packed_sequences(backend: Backend) -> None:
    """Packed documents tell the same apart as cu_seqlens."""
    lengths = [30, 1, 65, 4]
    p = problem((100, 2, 64), (100, 1, 64), backend.dtypes[-1], backend)
    ids = torch.tensor(documents(100, lengths), dtype=torch.int32, device=backend.device)
    one = cu_seqlens([100], backend.device)
    found = p.results(
        lambda *x: ops.attention(
            *x, causal=True, cu_seqlens_q=one, segment_ids=ids, return_lse=True
        )
    )
    wanted = p.results(
        lambda *x: ops.attention(
            *x, causal=True, cu_seqlens_q=cu_seqlens(lengths, backend.device), return_lse=True
        )
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_packed(backend: Backend) -> None:
    """All masks at once in packed sequences, of which some are empty: as the reference has it."""
    lengths_q, lengths_k = [5, 0, 70, 33, 3], [66, 4, 1, 0, 90]
    device, dtype = backend.device, backend.dtypes[-1]
    p = problem((111, 2, 80), (161, 1, 80), dtype, backend)
    p = replace(p, bias=torch.randn(5, 1, 72, 91, device=device).to(dtype))
    ids = [torch.randint(-1, 2, (n,), dtype=torch.int32, device=device) for n in (111, 161)]
    options = {
        **{
            "cu_seqlens_q": cu_seqlens(lengths_q, device),
            "cu_seqlens_k": cu_seqlens(lengths_k, device),
        },
        **{
            "segment_ids": tuple(ids),
            "image_ids": tuple(ids),
            "window_size": (30, 2),
            "softcap": 9.0,
        },
    }

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, bias=bias, return_lse=True, **options)

    found = p.results(call)
    with reference_ops():
        wanted = p.to(torch.float64).results(call)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


def test_skipped_tiles_are_not_read(backend: Backend) -> None:
    """Documents of 384 tokens, whole tiles of any kernel: NaN in the keys and values of one does
    not reach the others, as nothing of a tile is read that nobody sees."""
    p = dense(backend, (1152, 1152), (1, 1), batch=1, dtype=torch.float16)
    ids = torch.tensor([documents(1152, [384] * 3)], dtype=torch.int32, device=backend.device)
    poisoned = replace(p, k=p.k.clone(), v=p.v.clone())
    poisoned.k[:, 384:768] = poisoned.v[:, 384:768] = torch.nan
    clean, dirty = (
        x.results(lambda *qkv: ops.attention(*qkv, segment_ids=ids, return_lse=True))
        for x in (p, poisoned)
    )
    for i in (0, 2, 3, 4):  # out, dq, dk, dv
        for part in (slice(384), slice(768, None)):
            assert torch.equal(clean[i][:, part], dirty[i][:, part])


def test_the_same_bits_every_time(backend: Backend) -> None:
    p = with_bias(dense(backend, (100, 120)), 1, 1)
    masks = vlm_masks(backend, 100, 120, window_size=(40, 0), softcap=4.0)

    def run() -> list[Tensor]:
        return p.results(
            lambda *x: ops.attention(*x[:3], bias=x[3], return_lse=True, **masks.options())
        )

    first = run()
    for _ in range(1 if backend.small else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_empty(backend: Backend) -> None:
    for batch, seqlen_q, seqlen_k in [(0, 4, 4), (2, 0, 4), (2, 4, 0)]:
        p = with_bias(dense(backend, (seqlen_q, seqlen_k), batch=batch), 1, 1)
        ids = [torch.zeros(batch, n, dtype=torch.int32, device=p.q.device) for n in p_lengths(p)]
        out, lse, dq, dk, dv, dbias = p.results(
            lambda *x, ids=ids: ops.attention(
                *x[:3], bias=x[3], segment_ids=tuple(ids), return_lse=True
            )
        )
        assert torch.equal(out, torch.zeros_like(p.q)) and (lse == -torch.inf).all()
        assert all(not x.any() for x in (dq, dk, dv, dbias)) and dbias.shape == p.bias.shape


def p_lengths(p: Problem) -> tuple[int, int]:
    return p.q.shape[1], p.k.shape[1]


def test_gradcheck() -> None:
    q, k, v = (torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    bias = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = (torch.tensor([[0, 0, 1]] * 2).int(), torch.tensor([[0, 1, 0, 1, 1]] * 2).int())
    for options in ({"window_size": (2, 1), "softcap": 2.0}, {"segment_ids": ids}):
        assert torch.autograd.gradcheck(
            lambda *x, options=options: ops.attention(*x[:3], bias=x[3], **options),
            (q, k, v, bias),
        )


def test_compile(backend: Backend) -> None:
    """Fullgraph, with lengths that change."""

    def function(q: Tensor, k: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        out = ops.attention(q * 2, k, k, bias=bias, causal=True, segment_ids=ids, softcap=9.0)
        return out + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (9, 13):
        p = with_bias(dense(backend, (seqlen, seqlen), head_dim=40), 1, 2)
        ids = torch.arange(seqlen, dtype=torch.int32, device=p.q.device).div(5).int().expand(2, -1)
        ids = ids.contiguous()
        found = []
        for f in (function, compiled):
            leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.bias)]
            out = f(*leaves, ids)
            found.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck(backend: Backend) -> None:
    p = with_bias(dense(backend, (5, 6), head_dim=16), 1, 2)
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, p.bias)]
    ids = [torch.zeros(2, n, dtype=torch.int32, device=p.q.device) for n in (5, 6)]
    options = (None, None, *ids, *ids, None, 0, 0, 4, 0, 0.25, 3.0)
    torch.library.opcheck(torch.ops.vlmkernels.attention.default, (*leaves, *options))
    plain = [x.detach() for x in leaves]
    out, lse = torch.ops.vlmkernels.attention(*plain, *options)
    arguments = (p.dout.contiguous(), p.dlse, *plain[:3], out, lse, True, plain[3], *options)
    torch.library.opcheck(torch.ops.vlmkernels.attention_backward.default, arguments)


def test_autocast(backend: Backend) -> None:
    """A float32 bias stays what it is; another one follows q."""
    q = torch.randn(1, 9, 2, 32, device=backend.device)
    bias = torch.randn(1, 2, 9, 9, device=backend.device)
    half = q.bfloat16()
    with torch.autocast(backend.device, torch.bfloat16):
        assert torch.equal(
            ops.attention(q, q, q, bias=bias), ops.attention(half, half, half, bias=bias)
        )
        assert torch.equal(
            ops.attention(q, q, q, bias=bias.half()),
            ops.attention(half, half, half, bias=bias.half().bfloat16()),
        )


def test_bad_input(backend: Backend) -> None:
    x = torch.zeros(2, 9, 2, 64, device=backend.device).half()
    ids = torch.zeros(2, 9, dtype=torch.int32, device=backend.device)
    bias = torch.zeros(1, 2, 9, 9, device=backend.device)
    for options, error, message in [
        ({"window_size": (-2, 0)}, ValueError, r"window_size must be -1 .* got -2 on the left"),
        ({"window_size": (0, -7)}, ValueError, "got -7 on the right"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0 .* got -1"),
        ({"softcap": float("nan")}, ValueError, "softcap must be 0"),
        ({"bias": bias[0]}, ValueError, "bias must have shape"),
        ({"bias": bias[..., :8]}, ValueError, "bias must have shape"),
        ({"bias": bias.expand(3, 2, 9, 9)}, ValueError, "bias must have shape"),
        ({"bias": bias.bfloat16()}, TypeError, "bias must have the dtype of q"),
        ({"segment_ids": ids.long()}, TypeError, r"segment_ids\[0\] must be int32, got int64"),
        ({"segment_ids": ids[:1]}, ValueError, r"segment_ids\[0\] must have shape"),
        ({"image_ids": (ids, ids[:, :5])}, ValueError, r"image_ids\[1\] must have shape"),
        ({"image_ids": (ids, None)}, ValueError, r"must be given together"),
        ({"image_ids": ids.T.contiguous().T}, ValueError, r"image_ids\[0\] must be contiguous"),
        ({"segment_ids": 3}, TypeError, "segment_ids must be a torch.Tensor or a pair"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            ops.attention(x, x, x, **options)
