"""The CPU kernels of attention: every instruction set, every split of the work over threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmkernels import ops
from vlmkernels.testing import assert_as_accurate, reference_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths of queries and keys, num_heads, num_heads_k, head_dim, causal: blocks of 64 keys, panels
# of 48 rows and their tails, empty sequences, more queries than keys.
CASES = {
    "tails": ((1, 15, 16, 17, 49, 97), (1, 7, 63, 64, 65, 130), 2, 2, 64, False),
    "causal gqa": ((5, 0, 64, 1, 130, 17), (5, 3, 64, 9, 130, 40), 4, 2, 72, True),
    "causal few keys": ((9, 33, 70), (0, 8, 65), 6, 2, 8, True),
    "wide": ((3, 50), (70, 50), 2, 1, 256, True),
    "odd": ((40, 21), (40, 90), 7, 1, 104, False),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, object]]:
    lengths_q, lengths_k, heads, heads_k, dim, causal = CASES[name]
    torch.manual_seed(0)
    q = torch.randn(sum(lengths_q), heads, dim).to(dtype)
    k, v = (torch.randn(sum(lengths_k), heads_k, dim).to(dtype) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *accumulate(n)]).int() for n in (lengths_q, lengths_k))
    return [q, k, v], {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": causal}


def results(inputs: list[Tensor], options: dict[str, object], dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of the op on the inputs as dtype; gradients of out and of lse."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = ops.attention(*leaves, **options, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(inputs[0].dtype)
    dlse = torch.randn(lse.shape, generator=generator)
    dlse = dlse.masked_fill(lse.detach() == -torch.inf, torch.nan)
    grads = torch.autograd.grad([out, lse], leaves, [dout.to(dtype), dlse.to(lse.dtype)])
    return [out, lse, *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    inputs, options = packed(name, dtype)
    got = results(inputs, options, dtype)
    with reference_ops():
        same, exact = results(inputs, options, dtype), results(inputs, options, torch.float64)
    for what, *values in zip(("out", "lse", "dq", "dk", "dv"), got, same, exact, strict=True):
        assert_as_accurate(what, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (18, 1)])
def test_accuracy_of_decoding(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Both kernels (few rows and many), several slices, and nothing read beyond cache_seqlens."""
    lengths = [1, 0, 700, 65]
    q = torch.randn(4, 2, heads[0], 40).to(dtype)
    k, v = (torch.randn(4, 704, heads[1], 40).to(dtype) for _ in range(2))
    for cache in (k, v):
        for row, length in enumerate(lengths):
            cache[row, length:] = torch.nan
    cache_seqlens = torch.tensor(lengths).int()
    got = ops.attention_decode(q, k, v, cache_seqlens, return_lse=True)
    with reference_ops():
        same = ops.attention_decode(q, k, v, cache_seqlens, return_lse=True)
        exact = ops.attention_decode(
            q.double(), k.double(), v.double(), cache_seqlens, return_lse=True
        )
    for what, *values in zip(("out", "lse"), got, same, exact, strict=True):
        assert_as_accurate(what, *values)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_every_isa(isa: str) -> None:
    """The tests of accuracy again, on each instruction set up to this machine's best."""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "accuracy", __file__],
        env={**os.environ, "VLMKERNELS_ISA": isa, "PYTHONPATH": str(root)},
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_unknown_isa() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import vlmkernels.ops"],
        env={**os.environ, "VLMKERNELS_ISA": "avx3"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert "VLMKERNELS_ISA must be baseline, avx2, avx512 or amx, got avx3" in run.stderr


@pytest.mark.usefixtures("threads")
def test_threads() -> None:
    """One long sequence with one key head is split over threads; out is always the same."""
    q, k, v = torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16), torch.randn(1, 300, 1, 16)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        first = results([q, k, v], {"causal": True}, torch.float32)
        again = results([q, k, v], {"causal": True}, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        found.append(first)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])
        for a, b in zip(other[2:], found[0][2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


OUT_OF_MEMORY = """
import resource
import torch
from vlmkernels import ops
torch.set_num_threads(2)
q = torch.zeros(1, 2, 2, 8, requires_grad=True)
k = torch.zeros(1, 2**20, 2, 8)
ops.attention(q, k[:, :9], k[:, :9]).sum().backward()
out = ops.attention(q, k, k)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    out.sum().backward()
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_out_of_memory() -> None:
    """Two threads want 128 MiB or more each: an exception, not the end of the process."""
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert run.stdout == "MemoryError\n", run.stdout + run.stderr


def test_neighbours_are_not_touched() -> None:
    """Slices of a fused, NaN-filled qkv at odd offsets: only what belongs to q, k, v is read."""
    fused = torch.full((21, 3, 2, 33), torch.nan)
    fused[1:20, :, :, 1:25] = torch.randn(19, 3, 2, 24)
    q, k, v = fused[1:20, :, :, 1:25].unbind(1)
    cu_seqlens = torch.tensor([0, 4, 19]).int()
    got = results([q, k, v], {"cu_seqlens_q": cu_seqlens}, torch.float32)
    with reference_ops():
        want = results([q, k, v], {"cu_seqlens_q": cu_seqlens}, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float32_bias", [False, True])
def test_bias_of_many_keys(dtype: torch.dtype, float32_bias: bool) -> None:
    """Whole blocks of bias, in bfloat16 two vectors of keys at a time, and what is left of them."""
    torch.manual_seed(0)
    q = torch.randn(1, 37, 2, 64).to(dtype)
    k, v = (torch.randn(1, 151, 2, 64).to(dtype) for _ in range(2))
    bias = torch.randn(1, 2, 37, 151).to(torch.float32 if float32_bias else dtype)
    got = ops.attention(q, k, v, bias=bias)
    with reference_ops():
        same = ops.attention(q, k, v, bias=bias)
        exact = ops.attention(*(x.double() for x in (q, k, v)), bias=bias.double())
    assert_as_accurate("out", got, same, exact)
