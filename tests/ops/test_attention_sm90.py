"""attention on Hopper: that its kernels run, their tiles, neighbours, and any order of warps."""

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from tests.ops.attention_cases import (
    check,
    check_dense,
    cu_seqlens,
    eager_packed,
    problem,
    run_emulated,
)
from tests.ops.test_attention_packed import packed
from vlmkernels import ops

# One for each tile and one that leaves columns of it empty; the group sizes of GQA take turns.
HEAD_DIMS = [(64, 1), (72, 3), (80, 7), (88, 8), (96, 1), (104, 3), (112, 7), (128, 8), (40, 1)]
LENGTHS = [(1, 1), (64, 128), (239, 1), (799, 3), (113, 203), (108, 256), (65, 513), (400, 399)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("head_dim", "group"), HEAD_DIMS)
def test_tiles(hopper: Backend, head_dim: int, group: int, causal: bool) -> None:
    """Several blocks on both sides, the last of them ragged."""
    dtype = hopper.dtypes[group % 2]
    check_dense(hopper, (1, 210, 270, group, 1, head_dim), causal, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(hopper: Backend, lengths: tuple[int, int], causal: bool) -> None:
    check_dense(hopper, (1, *lengths, 2, 2, 72), causal, torch.bfloat16)


def test_many_tiles(hopper: Backend) -> None:
    """More blocks than CTAs: each takes several, in both directions of the schedule."""
    for causal in (False, True):
        check_dense(hopper, (3, 70, 66, 50, 25, 64), causal, torch.bfloat16)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [[200, 0, 1, 77], [64] * 5, [0, 300, 0]], ids=str)
def test_packed(hopper: Backend, lengths: list[int], causal: bool) -> None:
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((sum(lengths), 2, 104), (sum(lengths), 2, 104), torch.float16, hopper)
    check(p, packed(cu, causal=causal), lambda *qkv: eager_packed(*qkv, lengths, lengths, causal))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_neighbours_do_not_leak(hopper: Backend, head_dim: int) -> None:
    """A sequence full of NaN leaves the bits of those beside it alone."""
    lengths = [70, 150, 33]
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((sum(lengths), 2, head_dim), (sum(lengths), 1, head_dim), torch.bfloat16, hopper)
    clean = p.results(packed(cu))
    for x in (p.q, p.k, p.v, p.dout):
        x[70:220] = torch.nan
    poisoned = p.results(packed(cu))
    for part, (a, b) in enumerate(zip(clean, poisoned, strict=True)):
        for kept in (slice(0, 70), slice(220, 253)):
            index = (slice(None), kept) if part == 1 else (kept,)
            assert torch.equal(a[index], b[index])


def test_other_path(hopper: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMKERNELS_ARCH=80 takes the kernels of sm_80, on the same machine."""
    q, k, v = (torch.randn(1, 150, 2, 80, device=hopper.device).bfloat16() for _ in range(3))
    ours = ops.attention(q, k, v)
    monkeypatch.setenv("VLMKERNELS_ARCH", "80")
    other = ops.attention(q, k, v)
    torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)
    assert not torch.equal(ours, other)  # other tiles, other rounding
    for causal in (False, True):
        check_dense(hopper, (1, 70, 90, 2, 1, 80), causal, torch.bfloat16)


PROGRAM = """
import hashlib, torch
from vlmkernels import ops
torch.manual_seed(0)
total = hashlib.sha256()
for head_dim, causal in ((72, True), (128, False)):
    cu = torch.tensor([0, 150, 150, 333], dtype=torch.int32)
    leaves = [torch.randn(333, 2, head_dim).bfloat16().requires_grad_() for _ in range(3)]
    out, lse = ops.attention(*leaves, cu_seqlens_q=cu, causal=causal, return_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    for x in (out, lse, *grads):
        total.update(x.detach().float().numpy().tobytes())
print(total.hexdigest())
"""


def test_any_order_of_warps() -> None:
    """The same bits however warps and copies happen to interleave; and these kernels it is."""
    need_emulated_core()
    runs = [
        run_emulated(PROGRAM, PTXEMU_SEED=str(seed), PTXEMU_SLICE=str(30 + 100 * seed))
        for seed in range(4)
    ]
    assert len({r.stdout for r in runs}) == 1
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1").stderr
    assert "attention_fwd_sm90_kernel" in kernels and "attention_bwd_sm90_kernel" in kernels
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1", VLMKERNELS_ARCH="80").stderr
    assert "sm90" not in kernels and "attention_dq_kernel" in kernels


def test_broadcast_keys(hopper: Backend) -> None:
    """Strides of 0, of which TMA knows nothing, as their copies."""
    q = torch.randn(2, 70, 2, 64, device=hopper.device).half()
    k: Tensor = torch.randn(1, 80, 1, 64, device=hopper.device).half().expand(2, -1, 2, -1)
    assert torch.allclose(ops.attention(q, k, k), ops.attention(q, k.clone(), k.clone()), atol=2e-3)
