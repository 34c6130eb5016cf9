"""vq_lookup: exact on hard codebooks, accurate, gradients, compile, memory, bad input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from tests.ops.vq_cases import CODEBOOKS, assert_exact, distances, scales, spread, taming
from vlmkernels import ops
from vlmkernels.ops.vq_lookup import (
    LARGEST,
    _backward_kernel,
    nearest,
    reference,
    reference_backward,
)
from vlmkernels.testing import assert_as_accurate, emulate

METRICS = ("euclidean", "cosine")
# num_tokens, num_codes, dim: tails of tiles; a split of the operands up to 32; rows of no alignment
SHAPES = ((70, 300, 40), (130, 260, 8), (37, 16, 4), (9, 1, 33), (20, 200, 264))
WIDE = ((12, 150, 1024), (66, 300, 128), (40, 70, 200))


def differences(function: Callable[..., Tensor], tensors: list[Tensor], *grads: Tensor) -> list:
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = [o for o in function(*leaves) if o.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", CODEBOOKS, ids=lambda f: f.__name__)
def test_exact(backend: Backend, make: Callable[..., tuple[Tensor, Tensor]], metric: str) -> None:
    for shape in SHAPES:
        z, codebook = (t.to(backend.device) for t in make(*shape))
        for dtype in (torch.float32, *backend.dtypes):
            if dtype == torch.float16 and make is scales:
                continue
            tensors = z.to(dtype), codebook.to(dtype)
            assert_exact(ops.vq_lookup(*tensors, metric=metric), *tensors, metric)


@pytest.mark.parametrize("make", [spread, taming], ids=lambda f: f.__name__)
def test_exact_wide(backend: Backend, make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for shape in WIDE:
        tensors = [t.to(backend.device) for t in make(*shape)]
        assert_exact(ops.vq_lookup(*tensors), *tensors, "euclidean")


@pytest.mark.parametrize("arch", ["80", "86"])  # 86: less shared memory
def test_exact_without_wgmma(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other CUDA kernel, emulated."""
    need_emulated_core()
    monkeypatch.setenv("VLMKERNELS_ARCH", arch)
    with emulate():
        for make in CODEBOOKS:
            z, codebook = make(70, 300, 40)
            for metric in METRICS:
                assert_exact(ops.vq_lookup(z, codebook, metric=metric), z, codebook, metric)
        for shape in (*SHAPES, *WIDE):
            z, codebook = (t.bfloat16() for t in spread(*shape))
            assert_exact(ops.vq_lookup(z, codebook), z, codebook, "euclidean")


@pytest.mark.parametrize("num_codes", [16, 8192])
def test_exact_where_formulas_are_not(num_codes: int) -> None:
    """At taming's initialisation its own formula in fp32 and torch.cdist choose other codes."""
    z, codebook = taming(2048 if num_codes > 16 else 64, num_codes, 64)
    exact = nearest(z, codebook, "euclidean")
    assert torch.equal(ops.vq_lookup(z, codebook).indices, exact)
    if num_codes > 16:
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        assert not torch.equal((squares - 2 * z @ codebook.T).argmin(1), exact)
        assert not torch.equal(torch.cdist(z, codebook).argmin(1), exact)


def test_reference_agrees(backend: Backend) -> None:
    for metric in METRICS:
        z, codebook = (t.to(backend.device) for t in spread(50, 70, 24))
        codebook[3, 1], codebook[5] = torch.nan, codebook[4]
        *floats, indices = reference(z, codebook, metric, True)
        found = ops.vq_lookup(z, codebook, metric=metric)
        for got, want in zip(found, (indices, *floats), strict=True):
            torch.testing.assert_close(got, want)
        double = ops.vq_lookup(z.double(), codebook.double(), metric=metric)
        assert torch.equal(double.indices, indices) and double.distance.dtype == torch.float64


@pytest.mark.parametrize("metric", METRICS)
def test_not_finite(backend: Backend, metric: str) -> None:
    """Such codes never win; such tokens get index 0 and NaN."""
    z, codebook = (t.to(backend.device) for t in spread(40, 300, 48))
    clean = ops.vq_lookup(z, codebook, metric=metric)
    winners = clean.indices.unique()[:6]
    bad = codebook.clone()
    values = (torch.nan, torch.inf, -torch.inf, LARGEST, 1e30, -1e38)
    for code, value in zip(winners, values, strict=True):
        bad[code, 7] = value
    far = distances(z, codebook, metric)
    far[:, winners] = torch.inf
    got = ops.vq_lookup(z, bad, metric=metric)
    assert torch.equal(got.indices, far.argmin(1)) and got.distance.isfinite().all()
    z = z.clone()
    z[3, 0], z[33, 47] = torch.nan, -LARGEST
    got = ops.vq_lookup(z, codebook, metric=metric)
    invalid = torch.zeros(40, dtype=torch.bool, device=z.device)
    invalid[[3, 33]] = True
    assert torch.equal(got.distance.isnan(), invalid) and not got.indices[invalid].any()
    assert torch.equal(got.indices[~invalid], clean.indices[~invalid])
    none = ops.vq_lookup(z, torch.full_like(codebook, torch.nan), metric=metric)
    assert none.distance.isnan().all() and not none.indices.any()


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_accurate_gradients(backend: Backend, metric: str, straight_through: bool) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype."""
    for dtype in (torch.float32, *backend.dtypes):
        z, codebook = (t.to(backend.device, dtype) for t in spread(60, 20, 24))
        grads = torch.randn(60, 24), torch.randn(60), torch.randn(60)
        grads = [g.to(backend.device) for g in grads]

        def ours(*t: Tensor) -> tuple[Tensor, ...]:
            return ops.vq_lookup(*t, metric=metric, straight_through=straight_through)

        def plain(*t: Tensor) -> tuple[Tensor, ...]:
            return reference(*t, metric, straight_through)

        same = [grads[0].to(dtype), grads[1], grads[2]]
        got, theirs = (differences(f, [z, codebook], *same) for f in (ours, plain))
        exact = differences(plain, [z.double(), codebook.double()], *(g.double() for g in same))
        for name, *values in zip(("dz", "dcodebook"), got, theirs, exact, strict=True):
            assert_as_accurate(name, *values)


@pytest.mark.parametrize("metric", METRICS)
def test_gradient(backend: Backend, metric: str) -> None:
    """By finite differences, less the straight-through part, which is no derivative."""
    z, codebook = (t.double().to(backend.device).requires_grad_() for t in spread(7, 5, 3))
    z_only = lambda x: ops.vq_lookup(x, codebook.detach(), metric=metric).distance  # noqa: E731
    assert torch.autograd.gradcheck(z_only, (z,))

    def codes_only(x: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.vq_lookup(z.detach(), x, metric=metric, straight_through=False)
        return found.quantized, found.codebook_distance

    assert torch.autograd.gradcheck(codes_only, (codebook,))


def test_gradient_goes_where_it_should(backend: Backend) -> None:
    z, codebook = (t.to(backend.device).requires_grad_() for t in spread(9, 6, 8))
    ones = torch.ones_like(z)
    for output, straight, to_z in (
        *(("quantized", True, True), ("quantized", False, False)),
        *(("distance", True, True), ("codebook_distance", True, False)),
    ):
        found = ops.vq_lookup(z, codebook, straight_through=straight)
        value = getattr(found, output).sum()
        dz, dcodebook = torch.autograd.grad(value, (z, codebook), allow_unused=True)
        assert (dz is not None) == to_z and (dcodebook is not None) == (not to_z)
    found = ops.vq_lookup(z, codebook)
    assert not found.indices.requires_grad
    assert torch.equal(torch.autograd.grad(found.quantized, z, ones * 3)[0], ones * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_backward_kernel(metric: str, dtype: torch.dtype) -> None:
    """More codes than a thread takes at once, some without tokens, one without direction."""
    z, codebook = (t.to(dtype) for t in (torch.randn(300, 37), torch.randn(90, 37)))
    z[5] = codebook[7] = 0
    indices = torch.randint(45, (300,)) * 2 % 90
    indices[:9] = 7
    rows = (z, codebook[indices], indices)
    grads = (torch.randn(300, 37).to(dtype), None, torch.randn(300), torch.randn(300))
    arguments = (90, metric, True, True)
    got, again = (_backward_kernel(*rows, *grads, *arguments) for _ in range(2))
    wide = [t if t is None or t.dtype == torch.int64 else t.double() for t in (*rows, *grads)]
    for x, y, same in zip(got, reference_backward(*wide, *arguments), again, strict=True):
        torch.testing.assert_close(x, y.to(dtype))
        assert torch.equal(x, same)
    with pytest.raises(ValueError, match="indices"):
        _backward_kernel(*rows, *grads, 44, metric, True, True)


def test_compile(backend: Backend) -> None:
    z, codebook = (t.to(backend.device) for t in spread(33, 20, 16))

    def run(*t: Tensor) -> tuple[Tensor, ...]:
        found = ops.vq_lookup(*t)
        return found.quantized * 2, found.distance.mean(), found.codebook_distance.mean()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = torch.randn(33, 16, device=backend.device), *torch.ones(2, device=backend.device)
    for got, want in zip(
        differences(compiled, [z, codebook], *grads),
        differences(run, [z, codebook], *grads),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_opcheck(backend: Backend) -> None:
    for metric in METRICS:
        z, codebook = (t.to(backend.device).requires_grad_() for t in spread(12, 9, 8))
        op = torch.ops.vlmkernels.vq_lookup.default
        torch.library.opcheck(op, (z, codebook, metric, True))
        torch.library.opcheck(op, (z, codebook, metric, False))


def test_memory(backend: Backend) -> None:
    """Tensors among NaN, at addresses that fit no vector: nothing around them is read."""
    for dim in (8, 37, 72):
        for dtype in (torch.float32, *backend.dtypes):
            z, codebook = (t.to(backend.device, dtype) for t in spread(21, 140, dim))
            around = [t.new_full((t.numel() + 64,), torch.nan) for t in (z, codebook)]
            inside = [
                a[31 : 31 + t.numel()].view(t.shape).copy_(t)
                for a, t in zip(around, (z, codebook), strict=True)
            ]
            want = ops.vq_lookup(z, codebook)
            for got, value in zip(ops.vq_lookup(*inside), want, strict=True):
                assert torch.equal(got, value)
            got = ops.vq_lookup(z.t().contiguous().t(), codebook.t().contiguous().t())
            assert torch.equal(got.indices, want.indices)


def test_no_tokens(backend: Backend) -> None:
    for dtype in (torch.float32, torch.float64, *backend.dtypes):
        z = torch.empty(0, 8, device=backend.device, dtype=dtype, requires_grad=True)
        codebook = torch.randn(5, 8, device=backend.device, dtype=dtype, requires_grad=True)
        found = ops.vq_lookup(z, codebook, straight_through=False)
        assert [t.shape for t in found] == [(0,), (0, 8), (0,), (0,)]
        value = found.quantized.sum() + found.distance.sum() + found.codebook_distance.sum()
        dz, dcodebook = torch.autograd.grad(value, (z, codebook))
        assert dz.shape == z.shape and not dcodebook.any()


def test_bad_input(backend: Backend) -> None:
    z, codebook = (t.to(backend.device) for t in spread(6, 5, 8))
    wrong_values = {
        r"z must have shape \(num_tokens, dim\), got \(2, 3, 8\)": (z.view(2, 3, 8), codebook),
        r"z must have shape \(num_tokens, dim\) = \(6, 8\), got \(6, 7\)": (z[:, :7], codebook),
        r"codebook must have shape \(num_codes, dim\), got \(8,\)": (z, codebook[0]),
        r"codebook must have 1 to 1048576 codes, got \(0, 8\)": (z, codebook[:0]),
        r"codebook must have dim from 1 to 1024, got \(5, 1025\)": (
            z.new_zeros(2, 1025),
            z.new_zeros(5, 1025),
        ),
        r"codebook must have dim from 1 to 1024, got \(5, 0\)": (z[:, :0], codebook[:, :0]),
        r"codebook must have 1 to 1048576 codes, got \(1048577, 8\)": (
            z,
            codebook[:1].expand(2**20 + 1, 8),
        ),
    }
    for message, arguments in wrong_values.items():
        with pytest.raises(ValueError, match="vq_lookup: " + message):
            ops.vq_lookup(*arguments)
    with pytest.raises(ValueError, match="metric must be 'euclidean' or 'cosine', got 'dot'"):
        ops.vq_lookup(z, codebook, metric="dot")
    wrong_types = {
        "z must be float64, float32, float16, bfloat16, got int64": (z.long(), codebook),
        r"codebook must have the dtype of z \(float32\), got float64": (z, codebook.double()),
        "z must be a torch.Tensor, got NoneType": (None, codebook),
    }
    for message, arguments in wrong_types.items():
        with pytest.raises(TypeError, match="vq_lookup: " + message):
            ops.vq_lookup(*arguments)
