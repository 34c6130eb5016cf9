"""Threads other than the first: a new one has no CUDA context until it is given one."""

import threading

import torch
from torch import Tensor

from tests.conftest import Backend
from vlmkernels import ops


def results(backend: Backend) -> list[Tensor]:
    """Of ops whose Hopper kernels take tensor maps, which the driver makes for a context only."""
    torch.manual_seed(0)
    dtype = backend.dtypes[0]
    q, k, v = (torch.randn(1, 9, 2, 72, dtype=dtype).to(backend.device) for _ in range(3))
    images = torch.randn(1, 3, 16, 16, dtype=dtype).to(backend.device).requires_grad_()
    weight = torch.randn(16, 3, 8, 8, dtype=dtype).to(backend.device).requires_grad_()
    y = ops.patch_embed(images, weight)
    return [ops.attention(q, k, v), y, *torch.autograd.grad(y.float().square().sum(), [weight])]


def test_new_thread(backend: Backend) -> None:
    expected = results(backend)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(results(backend)))
    thread.start()
    thread.join()
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
