"""The forward on Hopper beyond full and causal: masks, wide heads, packed heads, float32 parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import Backend, need_emulated_core
from tests.ops.attention_cases import (
    Masks,
    check,
    check_dense,
    check_masked,
    cu_seqlens,
    eager_packed,
    problem,
    run_emulated,
)
from tests.ops.test_attention_masks import dense, vlm_masks, with_bias
from tests.ops.test_attention_packed import packed
from vlmkernels import ops

# One for each tile and some that leave columns of it empty.
HEAD_DIMS = [40, 64, 72, 80, 88, 96, 104, 128, 152, 192, 256]
# Query heads that share a key head, and queries: few enough that their heads share tiles.
SHORT = [(3, 1), (3, 40), (7, 16), (7, 21), (8, 5), (8, 33), (64, 1), (65, 3)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles(hopper: Backend, head_dim: int) -> None:
    """Several blocks on both sides, some of them skipped, some whole, all masks at once."""
    dtype = hopper.dtypes[head_dim // 8 % 2]
    p = dense(hopper, (170, 300), (2, 1), head_dim, dtype=dtype)
    check_masked(p, vlm_masks(hopper, 170, 300, window_size=(100, 0)))
    p = with_bias(p, 1, 2, torch.float32 if head_dim % 3 else None)
    check_masked(p, vlm_masks(hopper, 170, 300, window_size=(150, 20), softcap=4.0))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [136, 192, 256])
def test_wide_heads(hopper: Backend, head_dim: int, causal: bool) -> None:
    for dtype in hopper.dtypes:
        check_dense(hopper, (1, 150, 270, 2, 1, head_dim), causal, dtype)


@pytest.mark.parametrize(("group", "seqlen_q"), SHORT)
def test_packed_heads(hopper: Backend, group: int, seqlen_q: int) -> None:
    """The heads of a key head side by side in a tile: each with its own mask, bias, out and lse."""
    dtype = hopper.dtypes[group % 2]
    check_dense(hopper, (2, seqlen_q, 150, 2 * group, 2, 64), True, dtype)
    p = dense(hopper, (seqlen_q, 150), (2 * group, 2), 64, dtype=dtype)
    check_masked(with_bias(p, 1, 2 * group), Masks((20, 5)))


@pytest.mark.parametrize("lengths", [[20, 0, 1, 33], [5] * 7], ids=str)
def test_packed_heads_of_packed_sequences(hopper: Backend, lengths: list[int]) -> None:
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((sum(lengths), 14, 80), (sum(lengths), 2, 80), torch.bfloat16, hopper)
    check(p, packed(cu, causal=True), lambda *x: eager_packed(*x, lengths, lengths, True))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("options", [{}, {"window_size": (40, 40)}], ids=["full", "window"])
def test_neighbours_do_not_leak(
    hopper: Backend, head_dim: int, options: dict[str, tuple[int, int]]
) -> None:
    """A sequence full of NaN leaves the bits of those beside it alone, parts in float32 too."""
    lengths = [70, 150, 33]
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((sum(lengths), 2, head_dim), (sum(lengths), 1, head_dim), torch.bfloat16, hopper)
    poisoned = replace(p, q=p.q.clone(), k=p.k.clone(), v=p.v.clone())
    for x in (poisoned.q, poisoned.k, poisoned.v):
        x[70:220] = torch.nan
    for f in (ops.attention_partial, ops.attention):
        a, b = (f(x.q, x.k, x.v, cu_seqlens_q=cu, **options) for x in (p, poisoned))
        a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
        assert a.isfinite().all()
        for kept in (slice(0, 70), slice(220, 253)):
            assert torch.equal(a[kept], b[kept])


def test_parts_are_the_whole_rounded(hopper: Backend) -> None:
    """The same kernel, its result in float32."""
    q, k, v = (torch.randn(2, 150, 2, 80, device=hopper.device).bfloat16() for _ in range(3))
    options = {"window_size": (50, 0), "softmax_scale": 0.3}
    whole, lse = ops.attention(q, k, v, return_lse=True, **options)
    part, part_lse = ops.attention_partial(q, k, v, **options)
    assert torch.equal(part.bfloat16(), whole) and torch.equal(lse, part_lse)


def test_blind_queries(hopper: Backend) -> None:
    """Blocks of queries that see nothing at all, among others: out 0 and lse -inf."""
    q, k = (torch.randn(1, n, 2, 64, device=hopper.device).half() for n in (700, 40))
    ids = torch.full((1, 700), 7, dtype=torch.int32, device=hopper.device)
    ids[:, 300:333] = 1
    keys = torch.ones(1, 40, dtype=torch.int32, device=hopper.device)
    out, lse = ops.attention(q, k, k, segment_ids=(ids, keys), return_lse=True)
    blind = ids[0] == 7
    assert not out[:, blind].any() and (lse[:, :, blind] == -torch.inf).all()
    seen = ops.attention(q[:, ~blind], k, k)
    torch.testing.assert_close(out[:, ~blind], seen, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_path(hopper: Backend, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMKERNELS_ARCH=80 takes the kernels of sm_80, on the same machine."""
    monkeypatch.setenv("VLMKERNELS_ARCH", "80")
    p = with_bias(dense(hopper, (70, 150), head_dim=head_dim), 1, 2)
    check_masked(p, vlm_masks(hopper, 70, 150, window_size=(40, 0), softcap=4.0))


PROGRAM = """
import hashlib, torch
from vlmkernels import ops
torch.manual_seed(0)
total = hashlib.sha256()
def add(*tensors):
    for x in tensors:
        total.update(x.float().numpy().tobytes())
ids = (torch.arange(333) // 70).int()
images = torch.where(torch.arange(333) % 100 < 60, torch.arange(333) // 100, -1).int()
cu = torch.tensor([0, 150, 150, 333], dtype=torch.int32)
masks = [
    dict(window_size=(60, 3)),
    dict(causal=True, segment_ids=ids, image_ids=images),
    dict(bias=torch.randn(1, 2, 183, 183), softcap=5.0),
]
for head_dim in (72, 128, 256):
    q, k, v = (torch.randn(333, 2, head_dim).bfloat16() for _ in range(3))
    for options in masks:
        add(*ops.attention(q, k, v, cu_seqlens_q=cu, return_lse=True, **options))
    add(*ops.attention_partial(q, k, v, cu_seqlens_q=cu))
q, k = torch.randn(2, 9, 14, 64).half(), torch.randn(2, 300, 2, 64).half()
add(*ops.attention(q, k, k, causal=True, return_lse=True))
print(total.hexdigest())
"""


def test_any_order_of_warps() -> None:
    """The same bits however warps and copies interleave; and one kernel does all of this."""
    need_emulated_core()
    runs = [
        run_emulated(PROGRAM, PTXEMU_SEED=str(seed), PTXEMU_SLICE=str(30 + 100 * seed))
        for seed in range(4)
    ]
    assert len({r.stdout for r in runs}) == 1
    kernels = run_emulated(PROGRAM, PTXEMU_STATS="1").stderr
    assert "attention_fwd_masked_sm90_kernel" in kernels
    assert "attention_fwd_kernel" not in kernels and "attention_fwd_sm90_kernel" not in kernels
    assert (
        "attention_fwd_kernel"
        in run_emulated(PROGRAM, PTXEMU_STATS="1", VLMKERNELS_ARCH="80").stderr
    )


def test_broadcast_heads(hopper: Backend) -> None:
    """Key heads of stride 0, of which TMA knows nothing, under a mask."""
    q: Tensor = torch.randn(2, 70, 2, 64, device=hopper.device).half()
    k = torch.randn(2, 80, 1, 64, device=hopper.device).half().expand(-1, -1, 2, -1)
    a, b = (ops.attention(q, x, x, window_size=(30, 0)) for x in (k, k.clone()))
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
