"""null: exact, gradient, compile, dispatcher, memory, bad input: the six tests of a room."""

import pytest
import torch

from tests.conftest import Backend
from vlmkernels import nn, ops

SHAPES = [(1,), (7,), (16,), (3, 5, 8), (257, 33), (0,), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_exact(backend: Backend, shape: tuple[int, ...]) -> None:
    for dtype in backend.dtypes:
        x = torch.randn(shape, device=backend.device).to(dtype)
        y = nn.Null()(x)
        assert y.dtype == dtype
        assert x.numel() == 0 or y.data_ptr() != x.data_ptr()
        assert torch.equal(y, x)


def test_gradient(backend: Backend) -> None:
    x = torch.randn(5, 3, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 3, device=backend.device)
    (dx,) = torch.autograd.grad(ops.null(x), x, dy)
    assert torch.equal(dx, dy)
    assert torch.autograd.gradcheck(
        ops.null, torch.randn(4, dtype=torch.float64, requires_grad=True)
    )


def test_compile(backend: Backend) -> None:
    x = torch.randn(4, 6, device=backend.device, requires_grad=True)
    compiled = torch.compile(lambda x: ops.null(x * 2) + 1, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, x * 2 + 1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_opcheck(backend: Backend) -> None:
    x = torch.randn(3, 4, device=backend.device, requires_grad=True)
    torch.library.opcheck(torch.ops.vlmkernels.null.default, (x,))


def test_memory(backend: Backend) -> None:
    """Odd storage offsets, and the neighbours of what is copied are neither read nor written."""
    storage = torch.full((100,), torch.nan, device=backend.device)
    storage[3:40] = torch.arange(37.0, device=backend.device)
    y = ops.null(storage[3:40])
    assert torch.equal(y, torch.arange(37.0, device=backend.device))


def test_bad_input(backend: Backend) -> None:
    x = torch.randn(4, 6, device=backend.device)
    with pytest.raises(ValueError, match="null: x must be contiguous"):
        ops.null(x.t())
    with pytest.raises(TypeError, match=r"null: x must be float64, .* got int64"):
        ops.null(torch.arange(3, device=backend.device))
    with pytest.raises(TypeError):
        ops.null([1.0, 2.0])
