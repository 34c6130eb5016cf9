"""The same over real process groups (Gloo): one start of four processes for all checks here."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from vlmkernels.distributed import ContextPlan, ring_attention
from vlmkernels.distributed.transport import transport_of

pytestmark = pytest.mark.xdist_group("gloo")  # one start
SIZE, TOKENS, TIMEOUT = 4, 37, 20
CHECKS: dict[str, Callable[[int], None]] = {}
MASK: dict[str, Any] = {
    "causal": True,
    "cu_seqlens": torch.tensor([0, 11, 12, 37], dtype=torch.int32),
    "image_blocks": torch.tensor([-1] * 14 + [3] * 9 + [-1] * 14),
}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def tensors(
    dtype: torch.dtype = torch.float32, num_tokens: int = TOKENS, heads_k: int = 2
) -> list[Tensor]:
    """q, k, v, dout of all tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, num_tokens, heads, 16) for heads in (4, heads_k, heads_k, 4)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(plan: ContextPlan, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v, dout = (plan.shard(x).requires_grad_() for x in tensors(dtype))
    out = ring_attention(q, k, v, plan)
    assert isinstance(out, Tensor)
    return [plan.unshard(x) for x in (out, *torch.autograd.grad(out, [q, k, v], dout))]


def expect_alone(found: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Equal to one process that holds all tokens."""
    alone = dist.new_subgroups(1)[0]
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for x, y in zip(found, results(ContextPlan(TOKENS, group=alone, **MASK), dtype), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@check
def four_ranks(rank: int) -> None:
    for options in ({}, {"exchange": "all_gather"}, {"ulysses": True}, {"layout": "striped"}):
        expect_alone(results(ContextPlan(TOKENS, **options, **MASK)))


@check
def bfloat16(rank: int) -> None:
    expect_alone(results(ContextPlan(TOKENS, **MASK), torch.bfloat16), torch.bfloat16)


@check
def mesh(rank: int) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
    expect_alone(results(ContextPlan(TOKENS, group=grid, **MASK)))
    expect_alone(results(ContextPlan(TOKENS, group=grid["ring"], **MASK)))


@check
def group_with_nccl_exchanges_on_the_gpu(rank: int) -> None:
    """Also the group of a bare init_process_group(), whose get_backend() is "undefined"."""
    assert transport_of(None).device == torch.device("cpu")
    with (
        mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"),
        mock.patch.object(torch.cuda, "current_device", return_value=1),
    ):
        assert transport_of(None).device == torch.device("cuda", 1)


@check
def other_arguments_are_found(rank: int) -> None:
    with pytest.raises(ValueError, match="the plan must be the same on all ranks"):
        ContextPlan(TOKENS, causal=rank != 2)
    plan = ContextPlan(TOKENS, **MASK)
    q, k, v, _ = (plan.shard(x) for x in tensors(torch.float64 if rank == 1 else torch.float32))
    with pytest.raises(ValueError, match=r"dtype.* must be the same on all ranks"):
        ring_attention(q, k, v, plan)


def expect_same(
    plan: ContextPlan, theirs: Callable[..., Tensor], dtype: torch.dtype, heads_k: int, right: int
) -> None:
    """Their output of this rank's tokens, and the first `right` of dq, dk, dv, are ours."""
    everything = tensors(dtype, plan.layout.num_tokens, heads_k)
    q, k, v, dout = (plan.shard(x).requires_grad_() for x in everything)
    outs = [ring_attention(q, k, v, plan), theirs(q, k, v)]
    found, expected = ([o, *torch.autograd.grad(o, [q, k, v], dout)[:right]] for o in outs)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@check
def ring_attention_pytorch_agrees(rank: int) -> None:
    """In out and dq: its backward (0.5.20) takes `ring_pass`'s (received, sent) for (dk, dv)."""
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    for causal in (False, True):
        plan = ContextPlan(TOKENS - 1, layout="contiguous", causal=causal)
        theirs = partial(ring_flash_attn, causal=causal, bucket_size=9, ring_reduce_col=True)
        expect_same(plan, theirs, torch.float32, heads_k=4, right=1)


@check
def ring_flash_attn_agrees(rank: int) -> None:
    """In bfloat16: its float32 path aliases its accumulators."""
    from tests.distributed import flash_attn_shim

    flash_attn_shim.install()
    from ring_flash_attn import stripe_flash_attn_func, zigzag_ring_flash_attn_func

    theirs = {"zigzag": zigzag_ring_flash_attn_func, "striped": stripe_flash_attn_func}
    for layout, function in theirs.items():
        plan = ContextPlan(TOKENS - 5, layout=layout, causal=True)
        expect_same(plan, partial(function, causal=True), torch.bfloat16, heads_k=2, right=3)


class Block(nn.Module):
    """A transformer block whose attention is the ring's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.recompute = False

    def forward(self, x: Tensor, plan: ContextPlan) -> Tensor:
        if self.recompute:
            y = checkpoint(self.attend, x, plan, use_reentrant=False)
        else:
            y = self.attend(x, plan)
        return x + torch.nn.functional.gelu(self.out(y))

    def attend(self, x: Tensor, plan: ContextPlan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        return out.flatten(2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, plan: ContextPlan) -> Tensor:
        for block in self.blocks:
            x = block(x, plan)
        return x


def step(model: nn.Module, rows: Tensor, plan: ContextPlan, ranks: int) -> None:
    """One step of SGD on the mean over all tokens; gradients are averaged over `ranks` ranks."""
    out = model(plan.shard(rows), plan)
    loss = out.square().sum() * ranks / (2 * TOKENS * 32)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


@check
def training_step_with_fsdp(rank: int) -> None:
    """(dp 2, cp 2): two rows of data, each on a ring of two; parameters sharded over all four."""
    rows = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1))
    alone = dist.new_subgroups(1)[0]
    single, sharded = Stack(), Stack()
    step(single, rows, ContextPlan(TOKENS, group=alone, **MASK), 1)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    everybody = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    for block in sharded.blocks:
        block.recompute = True
        fully_shard(block, mesh=everybody)
    fully_shard(sharded, mesh=everybody)
    row = grid.get_local_rank("dp")
    step(sharded, rows[row : row + 1], ContextPlan(TOKENS, group=grid["cp"], **MASK), 4)
    for x, y in zip(single.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(y.full_tensor(), x)


@check
def compiled(rank: int) -> None:
    """The op is opaque: no graph break, and another batch's plan needs no new graph."""
    model = Stack()
    x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(2))
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for options in (MASK, {"causal": True}):
        plan = ContextPlan(TOKENS, layout="zigzag", **options)
        torch.testing.assert_close(fast(plan.shard(x), plan), model(plan.shard(x), plan))
    assert len(graphs) == 1


@check
def a_rank_dies(rank: int) -> None:
    """Last: the others end with an error that names rank, hop and peer, before the time-out."""
    plan = ContextPlan(TOKENS, layout="contiguous")
    q, k, v, _ = (plan.shard(x) for x in tensors())
    ring_attention(q, k, v, plan)
    dist.barrier()
    if rank == 3:
        os._exit(0)
    start = time.monotonic()
    said = ""
    for _ in range(3):  # what was sent before may still arrive
        try:
            ring_attention(q, k, v, plan)
        except RuntimeError as error:
            said = str(error)
            break
    assert re.match(rf"ring_attention: hop \d of 4: rank {rank} of 4 lost rank", said), said
    assert time.monotonic() - start < 2 * TIMEOUT


def main(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    for name, function in CHECKS.items():
        path = Path(folder) / f"{name}.{rank}"
        try:
            function(rank)
            path.write_text("ok")
        except BaseException as error:
            path.write_text(f"{type(error).__name__}: {error}")
            raise
    with contextlib.suppress(Exception):
        os._exit(0)  # the group lacks a rank: no orderly end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    with contextlib.suppress(Exception):  # each check's file says what was wrong
        mp.spawn(main, (str(path / "store"), str(path)), nprocs=SIZE)
    return path


@pytest.mark.parametrize("name", CHECKS)
def test_over_gloo(folder: Path, name: str) -> None:
    said = {rank: folder / f"{name}.{rank}" for rank in range(SIZE)}
    if name == "a_rank_dies":
        said.pop(3)
    found = {rank: path.read_text() if path.exists() else "nothing" for rank, path in said.items()}
    assert found == dict.fromkeys(said, "ok")
