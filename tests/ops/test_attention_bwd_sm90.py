"""attention's backward on Hopper under masks: that its kernels run, their tiles, blind rows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from tests.ops.attention_cases import (
    Masks,
    Problem,
    check,
    check_dense,
    check_masked,
    cu_seqlens,
    eager_packed,
    problem,
    run_emulated,
)
from tests.ops.test_attention_masks import vlm_masks, with_bias
from tests.ops.test_attention_packed import packed
from vlmkernels import ops

# Every tile, half of them with empty columns; and a group of GQA.
HEAD_DIMS = [(64, 3), (72, 1), (80, 2), (88, 1), (104, 2), (128, 3)]
# Beyond 128 two warpgroups share 64 keys, whatever the mask is.
WIDE = [(136, 2), (192, 1), (200, 1), (256, 2)]


def dense(backend: Backend, lengths: tuple[int, int], group: int, head_dim: int) -> Problem:
    return problem(
        (1, lengths[0], group, head_dim),
        (1, lengths[1], 1, head_dim),
        *(backend.dtypes[group % 2], backend),
    )


@pytest.mark.parametrize(("head_dim", "group"), HEAD_DIMS + WIDE)
def test_tiles(hopper: Backend, head_dim: int, group: int) -> None:
    """Several resident tiles, several blocks: some hidden, some whole, the last ragged."""
    p = dense(hopper, (280, 330), group, head_dim)
    masks = vlm_masks(hopper, 280, 330, window_size=(90, 0))
    masks = replace(masks, segment_ids=first_row(masks.segment_ids))
    check_masked(p, replace(masks, image_ids=first_row(masks.image_ids)), "ids")
    check_masked(p, Masks((100, 20)), "window")


@pytest.mark.parametrize(("head_dim", "group"), WIDE)
def test_wide_heads(hopper: Backend, head_dim: int, group: int) -> None:
    """Full and causal, softcap and bias: the same kernels; dense, and packed with an empty one."""
    dtype, lengths = hopper.dtypes[group % 2], [70, 0, 133]
    check_dense(hopper, (2, 70, 150, 2 * group, 2, head_dim), group == 2, dtype)
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((203, group, head_dim), (203, 1, head_dim), dtype, hopper)
    check(p, packed(cu, causal=True), lambda *x: eager_packed(*x, lengths, lengths, True))
    p = with_bias(dense(hopper, (150, 90), group, head_dim), 1, group)
    check_masked(p, Masks((100, 40), softcap=3.0))
    check_masked(p, Masks(), "bias")


def first_row(ids: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    assert ids is not None
    return ids[0][:1], ids[1][:1]


def test_scores_are_shaped(hopper: Backend) -> None:
    """Softcap and bias over several tiles, with a mask and without."""
    for window in ((-1, -1), (130, 0)):
        p = with_bias(dense(hopper, (150, 200), 2, 80), 1, 2)
        check_masked(p, Masks(window, softcap=3.0), f"{window}")
        check_masked(p, Masks(window), f"{window} bias")


def test_more_tiles_of_dbias_than_ctas(hopper: Backend) -> None:
    p = with_bias(dense(hopper, (130, 200), 24, 64), 1, 24)  # 144 tiles
    check_masked(p, Masks((150, 20)))


def test_blind_rows(hopper: Backend) -> None:
    """Queries that see nothing get no gradient, nor keys that nobody sees; whole tiles of them."""
    p = dense(hopper, (320, 400), 2, 72)
    of_q, of_k = (torch.zeros(1, n, dtype=torch.int32, device=p.q.device) for n in (320, 400))
    of_q[:, 60:260], of_k[:, 5:300] = 1, 2
    ids = (of_q, of_k)
    out, lse, dq, dk, dv = p.results(lambda *x: ops.attention(*x, segment_ids=ids, return_lse=True))
    assert not out[:, 60:260].any() and (lse[..., 60:260] == -torch.inf).all()
    assert not dq[:, 60:260].any() and not dk[:, 5:300].any() and not dv[:, 5:300].any()
    assert dq[:, :60].any() and dk[:, 300:].any() and all(x.isfinite().all() for x in (dq, dk, dv))
    check_masked(p, Masks(segment_ids=ids))


@pytest.mark.parametrize("head_dim", [64, 128, 136, 256])
def test_neighbours_do_not_leak(hopper: Backend, head_dim: int) -> None:
    """A packed sequence full of NaN leaves the bits of those beside it alone, under a window."""
    p = problem((253, 2, head_dim), (253, 1, head_dim), torch.bfloat16, hopper)
    cu = cu_seqlens([70, 150, 0, 33], hopper.device)

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(*qkv, cu_seqlens_q=cu, window_size=(40, 3), return_lse=True)

    clean = p.results(call)
    for x in (p.q, p.k, p.v, p.dout):
        x[70:220] = torch.nan
    for part, (a, b) in enumerate(zip(clean, p.results(call), strict=True)):
        for kept in (slice(0, 70), slice(220, 253)):
            index = (slice(None), kept) if part == 1 else (kept,)
            assert torch.equal(a[index], b[index])


PROGRAM = """
import hashlib, torch
from vlmkernels import ops
torch.manual_seed(0)
total = hashlib.sha256()
ids = torch.arange(333, dtype=torch.int32) // 70
images = torch.where(torch.arange(333) % 100 < 60, ids, -1).int()
bias = torch.randn(1, 2, 333, 333).bfloat16().requires_grad_()
end = torch.arange(333, dtype=torch.int32)
spans = torch.stack((end - 150, end + 20), 1)
cu = torch.tensor([0, 333], dtype=torch.int32)
for options in (
    {"window_size": (90, 5)},
    {"causal": True, "segment_ids": ids, "image_ids": images},
    {"softcap": 3.0, "bias": bias},
):
    leaves = [torch.randn(333, h, 72).bfloat16().requires_grad_() for h in (2, 1, 1)]
    out, lse = ops.attention(*leaves, cu_seqlens_q=cu, return_lse=True, **options)
    leaves += [bias] * ("bias" in options)
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    for x in grads:
        total.update(x.detach().float().numpy().tobytes())
for head_dim, options in (
    *((128, {"causal": True}), (128, {"key_spans": spans}), (136, {"key_spans": spans})),
    *((256, {}), (256, {"causal": True}), (256, {"window_size": (90, 5)})),
):
    q, k = (torch.randn(333, h, head_dim).half() for h in (2, 1))
    out, lse = ops.attention_partial(q, k, k, cu_seqlens_q=cu, **options)
    for x in ops.attention_partial_backward(q, q, k, k, lse, lse, cu_seqlens_q=cu, **options):
        total.update(x.numpy().tobytes())
print(total.hexdigest())
"""


def test_any_order_of_warps() -> None:
    """The same bits however warps and copies interleave; and these kernels it is, for all."""
    need_emulated_core()
    runs = [
        run_emulated(PROGRAM, PTXEMU_SEED=str(seed), PTXEMU_SLICE=str(30 + 100 * seed))
        for seed in range(4)
    ]
    assert len({r.stdout for r in runs}) == 1
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1").stderr
    assert "attention_bwd_sm90_kernel" in kernels and "MaskedScores" in kernels
    assert "attention_bwd_wide_sm90_kernel" in kernels
    assert "attention_dq_kernel" not in kernels and "attention_dkdv_kernel" not in kernels
    assert "attention_dbias_sm90_kernel" in kernels
