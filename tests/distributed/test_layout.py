"""Layouts hold every token once, and balance what they promise to balance."""

from typing import Any

import pytest
import torch

from vlmkernels.distributed import ContextPlan, Layout, context_parallel, make_mask, ring_attention
from vlmkernels.distributed import layout as layouts
from vlmkernels.testing.ranks import run_ranks


@pytest.mark.parametrize("name", layouts.NAMES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 129, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_token_has_one_rank(name: str, num_tokens: int, size: int) -> None:
    if name == "balanced":
        found = layouts.balanced(make_mask(num_tokens, causal=True).work, size)
    else:
        found = layouts.FIXED[name](num_tokens, size)
    positions = torch.cat([found.positions(rank) for rank in range(size)])
    assert positions.sort().values.tolist() == list(range(num_tokens))
    x = torch.randn(3, num_tokens, 2)
    parts = [found.take(x, rank, 1) for rank in range(size)]
    assert [p.shape[1] for p in parts] == [found.length(rank) for rank in range(size)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, x[:, found.positions(rank).long()])
    assert torch.equal(found.put(parts, 1), x)


def loads(mask: dict[str, Any], num_tokens: int, size: int, name: str) -> list[float]:
    """Pairs of query and key that each rank computes."""
    work = make_mask(num_tokens, **mask).work.double()
    fixed = layouts.FIXED.get(name)
    found = fixed(num_tokens, size) if fixed else layouts.balanced(work, size)
    return [float(work[found.positions(rank).long()].sum()) for rank in range(size)]


def packing(num_tokens: int, seed: int) -> torch.Tensor:
    """Borders of documents as in instruction data: lognormal lengths, mean about 2,000 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(4 * num_tokens // 2000 + 8, generator=generator) * 1.2 + 6.9).exp()
    ends = lengths.round().clamp(min=1).cumsum(0).int()
    ends = ends[ends < num_tokens]
    return torch.cat([torch.tensor([0]), ends, torch.tensor([num_tokens])]).int()


@pytest.mark.parametrize("size", [2, 8, 32])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_within_five_percent(size: int, seed: int) -> None:
    """Packed documents, packed documents with images, and one long document."""
    num_tokens = 8192 * size
    borders = packing(num_tokens, seed)
    index = torch.arange(num_tokens)
    images = torch.where(index % 3000 < 1024, index // 3000, -1)
    document = torch.searchsorted(borders[1:].long(), index, right=True)
    images = torch.where(images >= 0, images * len(borders) + document, -1)  # end with a document
    cases = [
        {"cu_seqlens": borders},
        {"cu_seqlens": borders, "image_blocks": images},
        {"image_blocks": images},
        {},
    ]
    for case in cases:
        load = loads({"causal": True, **case}, num_tokens, size, "balanced")
        assert max(load) <= 1.05 * sum(load) / size
    assert max(loads({"causal": True}, num_tokens, size, "zigzag")) <= 1.05 * sum(load) / size
    unequal = loads({"causal": True}, num_tokens, size, "contiguous")
    assert max(unequal) > 1.4 * sum(unequal) / size  # what balance is for


def test_balanced_keeps_tiles_together() -> None:
    found = layouts.balanced(make_mask(64 * 128, causal=True).work, 4)
    assert {c.start % 128 for chunks in found.chunks for c in chunks} == {0}
    lengths = [found.length(rank) for rank in range(4)]
    assert max(lengths) - min(lengths) <= 128


def test_chunks_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 4 tokens once"):
        Layout(4, ((range(0, 3),), (range(2, 4),)))
    with pytest.raises(ValueError, match="each of 4 tokens once"):
        Layout(4, ((range(0, 2),), (range(1, 3),)))
    with pytest.raises(ValueError, match="must ascend"):
        Layout(4, ((range(2, 4), range(0, 2)),))


def test_plan_arguments() -> None:
    with pytest.raises(ValueError, match="layout: expected one of contiguous"):
        ContextPlan(8, layout="zebra")
    with pytest.raises(ValueError, match="exchange: expected one of p2p"):
        ContextPlan(8, exchange="mail")
    with pytest.raises(ValueError, match="layout: expected 8 tokens on 1 ranks, got 6 on 2"):
        ContextPlan(8, layout=layouts.zigzag(6, 2))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected .* from 0 to 8"):
        ContextPlan(8, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="segment_ids: expected integers"):
        ContextPlan(8, segment_ids=torch.zeros(7, dtype=torch.int32))
    with pytest.raises(ValueError, match="x: expected 8 tokens along dimension 1"):
        ContextPlan(8).shard(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="num_tokens: expected at least 0, got -1"):
        ContextPlan(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": None}, "num_tokens: expected an int, got None"),
        ({"num_tokens": 2.5}, "num_tokens: expected an int, got 2.5"),
        ({"causal": "no"}, "causal: expected a bool, got 'no'"),
        ({"ulysses": 1}, "ulysses: expected a bool, got 1"),
        ({"cu_seqlens": [0, 8]}, "cu_seqlens: expected a torch.Tensor or None, got list"),
    ],
)
def test_types_of_plan_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        ContextPlan(**{"num_tokens": 8, **arguments})


def test_types_of_tensors() -> None:
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got list"):
        ContextPlan(8).shard([0] * 8)  # type: ignore[arg-type]
    wrong: Any = "no"
    with (
        pytest.raises(TypeError, match=r"^ulysses: expected"),
        context_parallel(ulysses=wrong),
    ):
        pass
    q: Any = torch.zeros(1, 8, 2, 16)
    with pytest.raises(
        TypeError, match=r"^ring_attention: plan must be of type .*ContextPlan, got None"
    ):
        ring_attention(q, q, q, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^ring_attention: q must be a torch.Tensor, got ndarray"):
        ring_attention(q.numpy(), q, q, ContextPlan(8))


def test_shard_and_unshard() -> None:
    x = torch.randn(2, 23, 3)

    def work(transport):  # type: ignore[no-untyped-def]
        plan = ContextPlan(23, group=transport, causal=True)
        leaf = x.clone().requires_grad_()
        part = plan.shard(leaf)
        part.sum().backward()
        return plan.unshard(part.detach()), plan.shard(torch.arange(23), 0), leaf.grad

    results = run_ranks((2, 2), work)
    for whole, _, _ in results:
        assert torch.equal(whole, x)
    assert sorted(torch.cat([held for _, held, _ in results]).tolist()) == list(range(23))
    assert torch.equal(sum(grad for _, _, grad in results), torch.ones_like(x))
