"""Ring attention of ranks in one process against attention on one device."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import need_emulated_core
from vlmkernels.distributed import ContextPlan, ring_attention
from vlmkernels.distributed.layout import NAMES
from vlmkernels.distributed.plan import plan_of
from vlmkernels.distributed.ring import merge
from vlmkernels.distributed.ulysses import copies_of_key_heads
from vlmkernels.testing import emulate
from vlmkernels.testing.ranks import run_ranks

TOKENS = 50
CU_SEQLENS = torch.tensor([0, 7, 7, 30, 50], dtype=torch.int32)
BLOCKS = torch.full((TOKENS,), -1)
BLOCKS[8:17], BLOCKS[20:26], BLOCKS[33:49] = 0, 1, 2
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, -1)},
    "packed": {"causal": True, "cu_seqlens": CU_SEQLENS},
    "packed full": {"cu_seqlens": CU_SEQLENS},
    "images": {"causal": True, "cu_seqlens": CU_SEQLENS, "image_blocks": BLOCKS},
    "images and window": {"causal": True, "window": (4, -1), "image_blocks": BLOCKS},
}
WAYS: dict[str, dict[str, Any]] = {
    "p2p": {},
    "all_gather": {"exchange": "all_gather"},
    "ulysses": {"ulysses": True},
}


def inputs(
    heads: tuple[int, int] = (4, 2), batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = [(batch, TOKENS, h, 8) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One device, float64, with the mask written out token by token."""
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    cu, (left, right) = mask.get("cu_seqlens"), mask.get("window", (-1, -1))
    blocks = mask.get("image_blocks", torch.full((TOKENS,), -1))
    for i, j in itertools.product(range(TOKENS), repeat=2):
        same = cu is None or sum(i >= cu[1:]) == sum(j >= cu[1:])
        causal = not mask.get("causal") or j <= i
        window = (left < 0 or i - left <= j) and (right < 0 or j <= i + right)
        seen[i, j] = same and ((causal and window) or blocks[i] == blocks[j] >= 0)
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def run(size: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv of all tokens."""
    dlse = torch.randn(tensors[0].shape[0], TOKENS, tensors[0].shape[2], dtype=torch.float64)

    def work(transport: Any) -> list[Tensor]:
        plan = ContextPlan(TOKENS, group=transport, **options)
        q, k, v, dout = (plan.shard(x).detach().requires_grad_() for x in tensors)
        out, lse = ring_attention(q, k, v, plan, return_lse=True)
        weight = plan.shard(dlse).transpose(1, 2)
        gradients = torch.autograd.grad([out, lse], [q, k, v], [dout, weight.to(lse.dtype)])
        parts = [out, lse.transpose(1, 2), *gradients]
        return [plan.unshard(x) for x in parts]

    results = run_ranks(size, work)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    return [*results[0], dlse]


def expected(tensors: list[Tensor], dlse: Tensor, mask: dict[str, Any]) -> list[Tensor]:
    q, k, v, dout = (x.double().requires_grad_() for x in tensors)
    out, lse = dense(q, k, v, mask)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse.transpose(1, 2)])
    return [out, lse.transpose(1, 2), *gradients]


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_ring(size: int, mask: str, layout: str) -> None:
    tensors = inputs()
    *found, dlse = run(size, tensors, layout=layout, **MASKS[mask])
    for x, y in zip(found, expected(tensors, dlse, MASKS[mask]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", ["all_gather", "ulysses"])
@pytest.mark.parametrize("mask", ["causal", "images"])
@pytest.mark.parametrize("size", [2, 4])
def test_other_ways(size: int, mask: str, way: str) -> None:
    tensors = inputs()
    *found, dlse = run(size, tensors, layout="zigzag", **WAYS[way], **MASKS[mask])
    for x, y in zip(found, expected(tensors, dlse, MASKS[mask]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("size", [(2, 2), (1, 4), (3, 1), (3, 2)])
@pytest.mark.parametrize("exchange", ["p2p", "all_gather"])
def test_mesh(size: tuple[int, int], exchange: str) -> None:
    tensors = inputs()
    *found, dlse = run(size, tensors, exchange=exchange, **MASKS["images"])
    for x, y in zip(found, expected(tensors, dlse, MASKS["images"]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", ["causal", "images"])
def test_emulated_kernels(mask: str, way: str) -> None:
    """The CUDA kernels, emulated: bfloat16 in and out."""
    need_emulated_core()
    tensors = inputs(batch=1, dtype=torch.bfloat16)
    with emulate():
        *found, dlse = run(2, tensors, layout="zigzag", **WAYS[way], **MASKS[mask])
    for x, y in zip(found, expected(tensors, dlse, MASKS[mask]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [3, 4])
def test_fewer_tokens_than_ranks(size: int, way: str) -> None:
    x = torch.randn(1, 2, size, 8, dtype=torch.float64)

    def run_on(transport: Any, **options: Any) -> Tensor:
        plan = ContextPlan(2, group=transport, causal=True, layout="contiguous", **options)
        part = plan.shard(x).detach().requires_grad_()
        out = ring_attention(part, part, part, plan)
        (gradient,) = torch.autograd.grad(out.square().sum(), part)
        return torch.cat([plan.unshard(out.detach()), plan.unshard(gradient)])

    alone = run_on(None)
    for found in run_ranks(size, lambda transport: run_on(transport, **WAYS[way])):
        torch.testing.assert_close(found, alone)


def relative_errors(size: int, mask: dict[str, Any], tensors: list[Tensor]) -> list[float]:
    *found, dlse = run(size, tensors, layout="zigzag", **mask)
    exact = expected(tensors, dlse, mask)
    pairs = zip(found, exact, strict=True)
    return [((x.detach().double() - y).norm() / y.norm()).item() for x, y in pairs]


def test_error_does_not_grow_with_the_ring() -> None:
    """bfloat16 in and out; what travels and adds up is not rounded."""
    tensors = inputs(dtype=torch.bfloat16)
    torch.manual_seed(1)
    alone = relative_errors(1, {"causal": True}, tensors)
    for size in (2, 4, 8, 16, 25):
        torch.manual_seed(1)
        errors = relative_errors(size, {"causal": True}, tensors)
        assert all(e <= 1.1 * a + 1e-7 for e, a in zip(errors, alone, strict=True)), (size, errors)


def test_merge_of_far_apart_and_empty_parts() -> None:
    lse = torch.tensor([80.0, -80.0, -torch.inf, 3.0, -torch.inf]).view(1, 1, 5)
    part_lse = torch.tensor([-80.0, 80.0, 1.0, -torch.inf, -torch.inf]).view(1, 1, 5)
    out, part = torch.full((1, 5, 1, 2), 1.0), torch.full((1, 5, 1, 2), 2.0)
    out[:, 2], out[:, 4], part[:, 3], part[:, 4] = 0, 0, 0, 0
    broken = merge(out[:, :1].clone(), lse[..., :1], part[:, :1], part_lse[..., :1] * torch.nan)
    assert all(x.isnan().all() for x in broken)  # a failure stays one
    merged, total = merge(out, lse, part, part_lse)
    assert merged[0, :, 0, 0].tolist() == [1, 2, 2, 1, 0]
    assert total[0, 0].tolist() == [80, 80, 1, 3, -torch.inf]


def test_hops_that_nobody_needs_are_left_out() -> None:
    """Documents that end on rank borders: nothing has to travel."""

    def work(transport: Any) -> list[int]:
        borders = torch.tensor([0, 8, 16, 24, 32])
        options: dict[str, Any] = {"group": transport, "layout": "contiguous", "causal": True}
        plans = [ContextPlan(32, cu_seqlens=cu, **options) for cu in (borders, borders[[0, 2, 4]])]
        return [plan.seen.hops for plan in plans]

    assert run_ranks(4, work) == [[1, 2]] * 4


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_bad_tensors(name: str) -> None:
    plan = ContextPlan(TOKENS)
    good = dict(zip("qkv", inputs()[:3], strict=True))
    with pytest.raises(ValueError, match=f"{name} must have shape \\(batch, 50"):
        ring_attention(**{**good, name: good[name][:, 1:]}, plan=plan)
    if name != "q":
        with pytest.raises(TypeError, match=f"{name} must have the dtype"):
            ring_attention(**{**good, name: good[name].float()}, plan=plan)
    with pytest.raises(ValueError, match="head_dim of q"):
        ring_attention(good["q"], good["k"][..., :4], good["v"][..., :4], plan)
    with pytest.raises(ValueError, match="Ulysses"):
        copies_of_key_heads(6, 2, 4)


def test_a_plan_that_is_gone() -> None:
    handle = ContextPlan(TOKENS).handle
    with pytest.raises(ValueError, match="plan must outlive"):
        plan_of(handle)


def test_packed_and_autocast() -> None:
    q, k, v, _ = inputs(batch=1, dtype=torch.float32)
    plan = ContextPlan(TOKENS, **MASKS["packed"])
    out, lse = ring_attention(q[0], k[0], v[0], plan, return_lse=True)
    dense_out, dense_lse = ring_attention(q, k, v, plan, return_lse=True)
    assert torch.equal(out, dense_out[0]) and torch.equal(lse, dense_lse[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert ring_attention(q, k, v, plan).dtype == torch.bfloat16
