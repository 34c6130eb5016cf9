"""Several ranks in one process, each a thread: tests and benches of what ranks do together."""

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from vlmkernels.distributed.transport import Grid, Pending, Transport

R = TypeVar("R")
TIMEOUT = 120.0  # seconds that a rank waits for another


class Mail:
    """What was sent and not yet received: (from, to) -> tensors in order."""

    def __init__(self, baton: Any) -> None:
        self.baton = baton  # held by the rank that computes, if one at a time does
        self._boxes: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, source: int, to: int) -> "queue.Queue[Tensor]":
        with self._lock:
            return self._boxes[source, to]


class ThreadTransport(Transport):
    """A rank of a group of threads. Tensors are copied when sent, as on a wire."""

    def __init__(self, mail: Mail, rank: int, size: int) -> None:
        self.mail, self.rank, self.size = mail, rank, size
        self._posted: dict[int, int] = defaultdict(int)  # receives, by source
        self._arrived: dict[int, list[Tensor | None]] = defaultdict(list)

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
    ) -> Pending:
        for to, x in sends:
            self.mail.box(self.rank, to).put(x.detach().clone())
        for _, like in receives:
            if like.is_floating_point():
                like.fill_(float("nan"))  # whoever reads before `wait` shows

        tickets = []  # matched in the order of posting, whatever is waited for first
        for source, _ in receives:
            tickets.append(self._posted[source])
            self._posted[source] += 1

        def finish() -> None:
            for (source, like), ticket in zip(receives, tickets, strict=True):
                arrived = self._arrived[source]
                while len(arrived) <= ticket:
                    arrived.append(self._receive(source, what))
                sent, arrived[ticket] = arrived[ticket], None
                assert sent is not None
                assert sent.shape == like.shape and sent.dtype == like.dtype, what
                like.copy_(sent)

        return Pending([like for _, like in receives], finish)

    def _receive(self, source: int, what: str) -> Tensor:
        box = self.mail.box(source, self.rank)
        self.mail.baton.__exit__(None, None, None)
        try:
            return box.get(timeout=TIMEOUT)
        except queue.Empty:
            raise RuntimeError(
                f"{what}: rank {self.rank} of {self.size} lost rank {source}"
            ) from None
        finally:
            self.mail.baton.__enter__()


class Ranks:
    """`size` ranks, or (rows, columns) on a mesh, that can work together again and again.

    one_at_a_time: a rank computes until it waits for another; else all at once.
    """

    def __init__(self, size: int | tuple[int, int], *, one_at_a_time: bool = False) -> None:
        rows, columns = (size, 1) if isinstance(size, int) else size
        self._baton: Any = threading.Lock() if one_at_a_time else contextlib.nullcontext()
        down = [Mail(self._baton) for _ in range(columns)]
        across = [Mail(self._baton) for _ in range(rows)]
        self.transports: list[Transport | Grid] = []
        for row in range(rows):
            for column in range(columns):
                ring = ThreadTransport(down[column], row, rows)
                heads = ThreadTransport(across[row], column, columns)
                self.transports.append(ring if isinstance(size, int) else Grid(ring, heads))
        self._threads = ThreadPoolExecutor(len(self.transports))

    def run(self, work: Callable[[Any], R]) -> list[R]:
        """work(transport) of every rank, results by rank. Raises what the first rank raised."""

        def one(transport: Transport | Grid) -> R:
            with self._baton:
                return work(transport)

        tasks = [self._threads.submit(one, transport) for transport in self.transports]
        return [task.result() for task in tasks]


def run_ranks(size: int | tuple[int, int], work: Callable[[Any], R]) -> list[R]:
    """work(transport) on new ranks."""
    return Ranks(size).run(work)
