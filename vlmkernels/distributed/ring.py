"""A ring of processes: tensors go round it while each process computes on those that it holds."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The processes of a group, each one sending to the next and receiving from the one before."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._next = ranks[(self.rank + 1) % self.size]
        self._previous = ranks[self.rank - 1]

    def start(self, *tensors: Tensor) -> "Exchange":
        """Starts sending these; the exchange's wait() gives what the process before sent.

        All processes start the same exchanges in the same order, with equal shapes and dtypes.
        """
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        sends = [dist.P2POp(dist.isend, x, self._next, self.group) for x in sent]
        receives = [dist.P2POp(dist.irecv, x, self._previous, self.group) for x in received]
        return Exchange(sent, received, dist.batch_isend_irecv([*sends, *receives]))

    def sum(self, x: Tensor) -> Tensor:
        """Of x over all processes, on all of them."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x


class Exchange:
    """Tensors under way. What is sent stays alive until wait()."""

    def __init__(
        self, sent: Sequence[Tensor], received: list[Tensor], works: Sequence[dist.Work]
    ) -> None:
        self._sent, self._received, self._works = sent, received, works

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._received
