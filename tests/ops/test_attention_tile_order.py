"""Tiles of packed sequences of unlike lengths on Hopper: in the order of their work, none empty."""

from itertools import pairwise

import pytest
import torch

from tests.conftest import Backend, need_emulated_core
from tests.ops.attention_cases import check, cu_seqlens, eager_packed, problem, run_emulated
from tests.ops.test_attention_packed import packed
from vlmkernels import _core, ops
from vlmkernels.ops.attention import for_core

LENGTHS = [70, 0, 300, 1, 129, 500, 128, 64]


def order(
    backend: Backend,
    lengths_q: list[int],
    lengths_k: list[int],
    window: tuple[int, int] = (-1, -1),
    heads: int = 16,  # so many that there are more tiles than CTAs
) -> list[tuple[int, int]]:
    """(block, sequence) of the tiles in the order in which a forward took them."""
    q, k = (torch.zeros(sum(x), heads, 128, device=backend.device).half()
            for x in (lengths_q, lengths_k))  # fmt: skip
    masks = [cu_seqlens(x, backend.device) for x in (lengths_q, lengths_k)] + [None] * 5
    # max_seqlen_q, max_seqlen_k, window, softmax_scale, softcap
    tensors, *options = for_core(
        q, k, None, *masks, max(lengths_q), max(lengths_k), *window, 1.0, 0.0
    )
    out, lse = torch.empty_like(q), q.new_empty((heads, len(q)), dtype=torch.float32)
    assert _core.C.attention(q, k, k, out, lse, tensors, *options)
    (count, _), *tiles = tensors[1].tolist()
    return [(block, sequence) for block, sequence in tiles[:count]]


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (150, 0)], ids=str)
def test_most_work_first(hopper: Backend, left: int, right: int) -> None:
    """Each tile once; a bin of the sort is a 1023th of the longest."""
    rows = 128
    tiles = order(hopper, LENGTHS, LENGTHS, (left, right))
    blocks = [(i, b) for b, n in enumerate(LENGTHS) for i in range(-(-n // rows))]
    assert sorted(tiles) == sorted(blocks)

    def keys(block: int, sequence: int) -> int:
        n, first = LENGTHS[sequence], block * rows
        end = min(first + rows, n) if right == 0 else n
        return end - (max(0, first - left) if left >= 0 else 0)

    work = [keys(*tile) for tile in tiles]
    assert all(a >= b - 1 for a, b in pairwise(work))
    assert work[0] == max(work) > min(work) == work[-1] == 1


def test_lengths_of_keys_count(hopper: Backend) -> None:
    tiles = order(hopper, [300, 300, 200], [10, 500, 0])
    assert sorted(b for _, b in tiles[:3]) == [1, 1, 1]
    assert sorted(tiles) == [(i, b) for i in range(3) for b in range(3) if (i, b) != (2, 2)]


def test_many_sequences(hopper: Backend) -> None:
    """More sequences than warps of the sorting kernel."""
    lengths = [1 + 37 * i % 401 for i in range(100)]
    tiles = order(hopper, lengths, lengths, heads=1)
    assert len(set(tiles)) == len(tiles) == sum(-(-n // 128) for n in lengths) > 132
    work = [lengths[b] for _, b in tiles]
    assert all(a >= b - 1 for a, b in pairwise(work))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_results(hopper: Backend, head_dim: int, causal: bool) -> None:
    lengths = [70, 0, 150, 1, 129]
    cu = cu_seqlens(lengths, hopper.device)
    p = problem((sum(lengths), 28, head_dim), (sum(lengths), 14, head_dim),
                torch.bfloat16, hopper)  # fmt: skip
    check(p, packed(cu, causal=causal), lambda *qkv: eager_packed(*qkv, lengths, lengths, causal))


PROGRAM = """
import torch
from vlmkernels import ops
torch.manual_seed(0)
lengths = [70, 0, 300, 1, 129, 200]
ends = torch.tensor([0, *lengths]).cumsum(0)
for head_dim, window in ((80, (-1, 0)), (128, (60, 20)), (192, (-1, -1))):
    x = [torch.randn(700, 2, head_dim).half() for _ in range(4)]
    def run(begin, end, **options):
        leaves = [t[begin:end].clone().requires_grad_() for t in x[:3]]
        if not options: leaves = [t.detach()[None].requires_grad_() for t in leaves]
        out = ops.attention(*leaves, window_size=window, **options)
        grads = torch.autograd.grad(out, leaves, x[3][begin:end].view_as(out))
        return [t.detach().reshape(-1, 2, head_dim) for t in (out, *grads)]
    found = run(0, 700, cu_seqlens_q=ends.int())
    alone = [run(int(a), int(b)) for a, b in zip(ends, ends[1:])]
    for got, want in zip(found, zip(*alone)):
        assert torch.equal(got, torch.cat(want)), head_dim
"""


def test_any_order_gives_the_same_bits() -> None:
    """As each sequence alone, forward and backward, plain, masked and wide, on three SMs."""
    need_emulated_core()
    run = run_emulated(PROGRAM, PTXEMU_SMS="3", PTXEMU_STATS="1")
    assert "attention_tile_order_kernel" in run.stderr


def test_wrong_workspace(hopper: Backend) -> None:
    q = torch.zeros(100, 2, 64, device=hopper.device).half()
    cu = cu_seqlens([60, 40], hopper.device)
    tensors, *options = for_core(q, q, None, cu, cu, *[None] * 5, 60, 60, -1, -1, 1.0, 0.0)
    lse = q.new_empty((2, 100), dtype=torch.float32)
    for wrong in (tensors[1][1:], tensors[1].float(), None):
        with pytest.raises((ValueError, TypeError), match="tile_order"):
            _core.C.attention(
                q, q, q, torch.empty_like(q), lse, (tensors[0], wrong, *tensors[2:]), *options
            )


def test_windows_are_not_sorted(hopper: Backend) -> None:
    """A tile for each sequence: nothing to win."""
    lengths = [64, 48, 64, 64]
    q = torch.randn(sum(lengths), 40, 80, device=hopper.device).half()
    cu = cu_seqlens(lengths, hopper.device)
    dense = [ops.attention(x[None], x[None], x[None])[0] for x in q.split(lengths)]
    assert torch.equal(ops.attention(q, q, q, cu_seqlens_q=cu), torch.cat(dense))
