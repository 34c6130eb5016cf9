"""`with context_parallel(group):` a model spreads the tokens of a batch over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .mask import expect_bool
from .plan import ContextPlan, Group


@dataclass
class _Context:
    options: dict[str, Any]
    plan: ContextPlan | None = None
    documents: tuple[int, ...] = field(default=())


_active: ContextVar[_Context | None] = ContextVar("context_parallel", default=None)
_open = 0  # how many are entered: torch.compile can look at this, not at a ContextVar


@contextmanager
def context_parallel(
    group: Group = None,
    *,
    layout: str | Layout = "balanced",
    exchange: str = "p2p",
    ulysses: bool = False,
) -> Iterator[None]:
    """Within it a model's forward with labels works on this rank's share of the tokens.

    Every rank calls the model with the same whole batch. Pictures become embeddings and positions
    are counted on the whole sequence; then each rank keeps its tokens through all layers, and
    attention goes over the ring. `.loss` is the loss of the whole batch; its gradients, averaged
    over the ranks of the group as FSDP and DDP do, are those of one process. `.logits` are of this
    rank's tokens, (tokens, vocab_size).

    Args:
        group, layout, exchange, ulysses: see `ContextPlan`.
    """
    expect_bool("ulysses", ulysses)
    options = {"group": group, "layout": layout, "exchange": exchange, "ulysses": ulysses}
    global _open
    token = _active.set(_Context(options))
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        _active.reset(token)


def active_plan(cu_seqlens: Tensor) -> ContextPlan | None:
    """The plan for packed causal documents inside of `context_parallel`; None outside.

    The plan of the same documents is used again.
    """
    context = _active.get() if _open else None
    if context is None:
        return None
    documents = tuple(cu_seqlens.tolist())
    if context.plan is None or context.documents != documents:
        context.plan = ContextPlan(
            documents[-1], causal=True, cu_seqlens=cu_seqlens, device=cu_seqlens.device,
            **context.options,
        )  # fmt: skip
        context.documents = documents
    return context.plan


def mean_over_ranks(part: Tensor, count: Tensor, plan: ContextPlan) -> Tensor:
    """sum of all ranks' `part` / sum of their `count`, both (); the same bits on all ranks.

    The gradient goes through this rank's part alone, times the number of ranks: averaged over
    ranks it is the gradient of the mean.
    """
    mean: Any = _MeanOverRanks.apply
    loss: Tensor = mean(part, count, plan)
    return loss


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, count: Tensor, plan: ContextPlan) -> Tensor:
        ctx.plan = (
            plan  # must live until the layers' backward; a compiled graph has its number only
        )
        numbers = torch.stack((part.double(), count.double()))
        shapes = [numbers.shape] * plan.everybody.size
        total = torch.stack(plan.everybody.gather(numbers, shapes, "loss")).sum(0)
        divisor = total[1].clamp(min=1)
        ctx.factor = (plan.everybody.size / divisor).to(part.dtype)
        return (total[0] / divisor).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None, None
