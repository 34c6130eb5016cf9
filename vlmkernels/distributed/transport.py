"""How the ranks of a group exchange tensors: point to point, any shapes, without copies of ours."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Pending:
    """Tensors on their way; `wait` before the received ones are read or any of them is reused."""

    def __init__(self, received: list[Tensor], finish: Callable[[], None]) -> None:
        self._received, self._finish = received, finish

    def wait(self) -> list[Tensor]:
        self._finish()
        return self._received


class Transport(ABC):
    """A rank's way to its peers. Ranks count from 0 to size within the group."""

    rank: int
    size: int
    device = torch.device("cpu")  # where tensors are unless somebody says

    @abstractmethod
    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
    ) -> Pending:
        """Starts sending tensors to ranks and receiving from others into the tensors given.

        Between two ranks, what is sent arrives in order. `what` names the exchange in errors.
        """

    def shift(self, x: Tensor, like: Tensor, offset: int, what: str) -> Pending:
        """Sends x to rank + offset; receives into `like`, from rank - offset."""
        to, source = (self.rank + offset) % self.size, (self.rank - offset) % self.size
        if to == self.rank:
            return Pending([x], lambda: None)
        return self.exchange([(to, x)], [(source, like)], what)

    def rotate(self, *tensors: Tensor, what: str) -> Pending:
        """Sends these to the next rank; receives the like from the one before."""
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if to == self.rank:
            return Pending(list(tensors), lambda: None)
        like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        return self.exchange([(to, x) for x in tensors], [(source, x) for x in like], what)

    def swap(self, parts: Sequence[Tensor], like: Sequence[Tensor], what: str) -> Pending:
        """All to all: parts[r] goes to rank r; receives into like[r] from rank r."""
        others = [r for r in range(self.size) if r != self.rank]
        pending = self.exchange(
            [(r, parts[r]) for r in others], [(r, like[r]) for r in others], what
        )
        received = list(like)
        received[self.rank] = parts[self.rank]
        return Pending(received, lambda: void(pending.wait()))

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]], what: str) -> list[Tensor]:
        """Everybody's x, of these shapes."""
        like = [x.new_empty(tuple(shape)) for shape in shapes]
        return self.swap([x.contiguous()] * self.size, like, what).wait()

    def total(self, x: Tensor, what: str) -> Tensor:
        """The sum of everybody's x, in the same order everywhere."""
        return torch.stack(self.gather(x, [x.shape] * self.size, what)).sum(0)


def void(_: object) -> None:
    """Drops a result."""


class GroupTransport(Transport):
    """Over a torch process group (NCCL, Gloo). NCCL works on a stream of its own: what is enqueued
    after `exchange` and before `wait` runs beside the transfer."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Not get_backend(), which is "undefined" where init_process_group was given none.
        if "nccl" in str(dist.get_backend_config(group)):
            self.device = torch.device("cuda", torch.cuda.current_device())

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
    ) -> Pending:
        peers = sorted({r for r, _ in (*sends, *receives)})
        kept = [(r, x.contiguous()) for r, x in sends]
        operations = [
            dist.P2POp(operation, x, group=self.group, group_peer=r)
            for operation, pairs in ((dist.isend, kept), (dist.irecv, receives))
            for r, x in pairs
            if x.numel()
        ]
        if not operations:
            return Pending([x for _, x in receives], lambda: None)
        works: list[dist.Work] = []

        def start() -> None:
            works.extend(dist.batch_isend_irecv(operations))

        def finish() -> None:
            for work in works:
                work.wait()
            kept.clear()

        self._guard(what, peers, start)
        return Pending([x for _, x in receives], lambda: self._guard(what, peers, finish))

    def _guard(self, what: str, peers: Sequence[int], run: Callable[[], None]) -> None:
        try:
            run()
        except RuntimeError as error:  # a peer died or stalled: the group's timeout ended the wait
            of_all = ", ".join(str(dist.get_global_rank(self.group, r)) for r in peers)
            raise RuntimeError(
                f"{what}: rank {self.rank} of {self.size} lost rank "
                f"{' or '.join(map(str, peers))} (of all ranks: {of_all}): {error}"
            ) from error


class Alone(Transport):
    """A group of one."""

    rank, size = 0, 1

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
    ) -> Pending:
        assert not sends and not receives
        return Pending([], lambda: None)


def transport_of(group: ProcessGroup | Transport | None) -> Transport:
    """The way through a process group; None: the default group, or nobody when there is none."""
    if isinstance(group, Transport):
        return group
    if group is None:
        if not dist.is_initialized():
            return Alone()
        group = dist.group.WORLD
        assert group is not None
    return GroupTransport(group)


class Grid:
    """All ranks of a 2-d mesh, row by row; what they gather goes along rows, then columns."""

    def __init__(self, rows: Transport, columns: Transport) -> None:
        self.rows, self.columns = rows, columns
        self.rank = rows.rank * columns.size + columns.rank
        self.size = rows.size * columns.size
        self.device = rows.device

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]], what: str) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        width = self.columns.size
        of_row = [sizes[r * width : (r + 1) * width] for r in range(self.rows.size)]
        row = self.columns.gather(x.flatten(), [[n] for n in of_row[self.rows.rank]], what)
        grid = self.rows.gather(torch.cat(row), [[sum(row)] for row in of_row], what)
        flat = torch.cat(grid).split(sizes)
        return [part.view(tuple(shape)) for part, shape in zip(flat, shapes, strict=True)]
