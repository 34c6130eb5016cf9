"""The plan of a batch: what the ranks agree on before they compute attention together."""

import hashlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from . import gather, layout, ring
from .block import view_of
from .layout import Layout
from .mask import Mask, expect_bool, make_mask
from .transport import Alone, Grid, Transport, transport_of
from .ulysses import copies_of_key_heads, join_heads, split_heads

EXCHANGES = ("p2p", "all_gather")
# A plan reaches the op as a number in a tensor, so that a compiled graph serves every batch's plan.
_plans: "weakref.WeakValueDictionary[int, ContextPlan]" = weakref.WeakValueDictionary()
_numbers = itertools.count()
Group = ProcessGroup | DeviceMesh | Transport | Grid | None


class ContextPlan:
    """Who holds which tokens of a batch, what they see, and how keys reach queries.

    Every rank makes the same plan from the same arguments (checked by one small exchange), takes
    its tokens with `shard`, and computes `attention` on them.

    Args:
        num_tokens: of the whole sequence (of each row; or of all packed documents).
        group: a process group; a 1-d DeviceMesh; a 2-d DeviceMesh, the ring along its first, heads
            (Ulysses) along its second dimension; None: the default group.
        layout: "contiguous", "zigzag", "striped", "balanced", or a `Layout`.
        exchange: "p2p", the ring, or "all_gather" of keys and values.
        ulysses: True splits heads over all of a 1-d group instead.
        causal, cu_seqlens, segment_ids, image_blocks, window: of all tokens; see `make_mask`.
        device: of the tokens; default: the present GPU for a group of NCCL, else that of the ids
            given, or the CPU.

    Raises:
        ValueError: an argument is not as above, or another rank's plan differs. TypeError: an
            argument of another type.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        group: Group = None,
        layout: str | Layout = "balanced",
        exchange: str = "p2p",
        ulysses: bool = False,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        segment_ids: Tensor | None = None,
        image_blocks: Tensor | None = None,
        window: tuple[int, int] = (-1, -1),
        device: torch.device | str | None = None,
    ) -> None:
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange: expected one of {', '.join(EXCHANGES)}, got {exchange!r}")
        expect_bool("ulysses", ulysses)
        self.exchange = gather if exchange == "all_gather" else ring
        self.everybody, self.ring, self.heads = _transports(group, ulysses)
        if device is None:
            device = self.everybody.device
            if device.type == "cpu":  # NCCL takes no tensors from there
                ids = (x for x in (cu_seqlens, segment_ids, image_blocks) if isinstance(x, Tensor))
                device = next((x.device for x in ids), device)
        self.mask = make_mask(
            num_tokens,
            causal=causal,
            cu_seqlens=cu_seqlens,
            segment_ids=segment_ids,
            image_blocks=image_blocks,
            window=window,
            device=device,
        )
        self.layout = _layout(layout, num_tokens, self.everybody.size, self.mask)
        self.rank = self.everybody.rank
        self._lengths = [
            self.layout.length(self.ring.rank * self.heads.size + r) for r in range(self.heads.size)
        ]
        held = [_rows(self.layout, row, self.heads.size, device) for row in range(self.ring.size)]
        self._sort = held[self.ring.rank].argsort()  # tokens of several ranks into ascending order
        self.seen = _shard(self.mask, [p.sort().values for p in held], self.ring.rank)
        self._signatures: set[tuple[Any, ...]] = set()
        sizes = self.ring.size, self.heads.size
        number = next(_numbers)
        self.handle = torch.tensor(number)
        _plans[number] = self
        self._agree(
            "the plan", (sizes, num_tokens, exchange, self.layout.chunks, _digest(self.mask))
        )

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens out of all; differentiable."""
        _expect_size("x", x, dim, self.layout.num_tokens)
        return self.layout.take(x, self.rank, dim)

    @torch.no_grad()
    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """All tokens, on every rank, out of each rank's; without gradient."""
        _expect_size("x", x, dim, self.layout.length(self.rank))
        shapes = [list(x.shape) for _ in range(self.everybody.size)]
        for r, shape in enumerate(shapes):
            shape[dim] = self.layout.length(r)
        return self.layout.put(self.everybody.gather(x, shapes, "unshard"), dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse) of this rank's tokens, (batch, tokens, num_heads, head_dim), over all."""
        self._check(q, k, v)
        q, k, v = self._to_heads(q, k, v)
        out, lse = self.exchange.forward(q, k, v, self.seen, self.ring, scale)
        out, lse = out.to(q.dtype), lse.transpose(1, 2)
        out, lse = (self._to_tokens(x, "ring_attention") for x in (out, lse))
        return out, lse.transpose(1, 2).contiguous()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dq, dk, dv) in float32 (float64); delta = rowsum(out dout) - dlse."""
        num_heads_k = k.shape[2]
        what = "ring_attention backward"
        q, k, v = self._to_heads(q, k, v)
        dout = self._split(dout, what)
        statistics = torch.stack((lse, delta), -1).transpose(1, 2)  # tokens, heads, 2
        lse, delta = self._split(statistics, what).transpose(1, 2).unbind(-1)
        gradients = self.exchange.backward(dout, q, k, v, lse, delta, self.seen, self.ring, scale)
        dq, dk, dv = (self._to_tokens(x, what) for x in gradients)
        if dk.shape[2] != num_heads_k:  # copies of key heads
            dk, dv = (x.unflatten(2, (num_heads_k, -1)).sum(3) for x in (dk, dv))
        return dq, dk, dv

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        copies = copies_of_key_heads(q.shape[2], k.shape[2], self.heads.size)
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        what = "ring_attention: heads"
        return [self._split(x, what) for x in (q, k, v)]

    def _split(self, x: Tensor, what: str) -> Tensor:
        if self.heads.size == 1:
            return x
        return split_heads(x, self._lengths, self.heads, what).index_select(1, self._sort)

    def _to_tokens(self, x: Tensor, what: str) -> Tensor:
        if self.heads.size == 1:
            return x
        x = torch.empty_like(x).index_copy_(1, self._sort, x)
        return join_heads(x, self._lengths, self.heads, what)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """What this rank can see wrong, then, at the first call, what differs between ranks."""
        tokens = self.layout.length(self.rank)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[1] != tokens or x.shape[0] != q.shape[0]:
                raise ValueError(
                    f"ring_attention: {name} must have shape (batch, {tokens}, num_heads, "
                    f"head_dim) on rank {self.rank}, got {tuple(x.shape)}"
                )
            if x.device != self.mask.first.device:
                raise ValueError(
                    f"ring_attention: {name} must be on the device of the plan, "
                    f"{self.mask.first.device}, got {x.device}"
                )
            if x.dtype != q.dtype or x.device != q.device:
                raise TypeError(
                    f"ring_attention: {name} must have the dtype and device of q, {q.dtype} on "
                    f"{q.device}, got {x.dtype} on {x.device}"
                )
        if k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[2] % max(k.shape[2], 1):
            raise ValueError(
                "ring_attention: k and v must have the head_dim of q and a number of heads that "
                f"divides {q.shape[2]}, got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if self.mask.first.shape[0] not in (1, q.shape[0]):
            raise ValueError(
                f"ring_attention: q must have the batch of the plan's masks, "
                f"{self.mask.first.shape[0]}, got {q.shape[0]}"
            )
        signature = (q.dtype, q.shape[0], *q.shape[2:], k.shape[2])
        if signature not in self._signatures:
            self._agree("q and k (dtype, batch, num_heads, head_dim, num_heads_k)", signature)
            self._signatures.add(signature)

    def _agree(self, subject: str, content: tuple[Any, ...]) -> None:
        """ValueError on every rank unless all ranks come with the same content."""
        size, rank = self.everybody.size, self.everybody.rank
        if size == 1:
            return
        text = hashlib.sha256(repr(content).encode()).digest()[:24]
        mine = torch.frombuffer(bytearray(text), dtype=torch.int64).to(self.everybody.device)
        what = f"ring_attention: agreeing on {subject}"
        others = self.everybody.gather(mine, [mine.shape] * size, what)
        different = [r for r, other in enumerate(others) if not torch.equal(other, mine)]
        if different:
            shown = content if len(repr(content)) < 200 else "(long)"
            raise ValueError(
                f"ring_attention: {subject} must be the same on all ranks; rank {rank} has "
                f"{shown}, which differs on rank {', '.join(map(str, different))}"
            )


def plan_of(handle: Tensor) -> ContextPlan:
    """The plan with this number. Raises ValueError when it is gone."""
    plan = _plans.get(int(handle))
    if plan is None:
        raise ValueError("ring_attention: plan must outlive the backward pass, but it is gone")
    return plan


def _transports(group: Group, ulysses: bool) -> tuple[Transport | Grid, Transport, Transport]:
    """(all ranks, the ring, those that share heads); ranks count row by row of a mesh."""
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            raise ValueError(f"group: expected a DeviceMesh of 1 or 2 dimensions, got {group.ndim}")
        if group.ndim == 2:
            rows, columns = (transport_of(group.get_group(d)) for d in range(2))
            return Grid(rows, columns), rows, columns
        group = group.get_group()
    if isinstance(group, Grid):
        return group, group.rows, group.columns
    everybody = transport_of(group)
    return (everybody, Alone(), everybody) if ulysses else (everybody, everybody, Alone())


def _layout(wanted: str | Layout, num_tokens: int, size: int, mask: Mask) -> Layout:
    if isinstance(wanted, Layout):
        if (wanted.num_tokens, wanted.size) != (num_tokens, size):
            raise ValueError(
                f"layout: expected {num_tokens} tokens on {size} ranks, got {wanted.num_tokens} "
                f"on {wanted.size}"
            )
        return wanted
    if wanted == "balanced":
        return layout.balanced(mask.work, size)
    if wanted not in layout.FIXED:
        raise ValueError(f"layout: expected one of {', '.join(layout.NAMES)}, got {wanted!r}")
    return layout.FIXED[wanted](num_tokens, size)


def _rows(layout: Layout, row: int, width: int, device: torch.device | str) -> Tensor:
    """Positions of the tokens of the ranks that share heads."""
    return torch.cat([layout.positions(row * width + c, device) for c in range(width)])


def _shard(mask: Mask, held: Sequence[Tensor], rank: int) -> ring.Shard:
    """held: positions of the tokens of each rank, in ascending order."""
    mine = held[rank].long()
    first, last = mask.first[:, mine].contiguous(), mask.last[:, mine].contiguous()
    everything = torch.cat(list(held))
    order = everything.argsort()
    views = [view_of(first, last, positions) for positions in (*held, everything[order])]
    return ring.Shard(tuple(map(len, held)), tuple(views), _visible(mask, held), order)


def _visible(mask: Mask, held: Sequence[Tensor]) -> tuple[tuple[bool, ...], ...]:
    """[rank][source]: whether a query of rank sees a key of source."""
    size = len(held)
    owner = torch.empty(mask.num_tokens, dtype=torch.int64, device=mask.first.device)
    for rank, positions in enumerate(held):
        owner[positions.long()] = rank
    begin, end = mask.first.clamp(min=0).long(), (mask.last + 1).long()
    end = end.clamp(max=mask.num_tokens).maximum(begin.clamp(max=mask.num_tokens))
    begin = begin.minimum(end)
    columns = []
    for source in range(size):
        count = torch.nn.functional.pad((owner == source).cumsum(0), (1, 0))  # keys before a place
        sees = (count[end] > count[begin]).any(0)
        columns.append(torch.bincount(owner[sees], minlength=size) > 0)
    table = torch.stack(columns, 1) if columns else owner.new_empty((0, 0))
    return tuple(tuple(bool(x) for x in row) for row in table.tolist())


def _digest(mask: Mask) -> str:
    data = torch.stack((mask.first, mask.last)).cpu().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _expect_size(name: str, x: Tensor, dim: int, size: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != size:
        raise ValueError(
            f"{name}: expected {size} tokens along dimension {dim}, got shape {tuple(x.shape)}"
        )
