"""Several ranks in one process, each a thread: tests and benches of what ranks do together."""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from vlmkernels.distributed.transport import Grid, Pending, Transport

R = TypeVar("R")
TIMEOUT = 120.0  # seconds that a rank waits for another


class _Mail:
    """What was sent and not yet received: (from, to) -> tensors in order."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self.lock = threading.Lock()

    def box(self, source: int, to: int) -> "queue.Queue[Tensor]":
        with self.lock:
            return self.boxes[source, to]


class ThreadTransport(Transport):
    """A rank of a group of threads. Tensors are copied when sent, as on a wire."""

    def __init__(self, mail: _Mail, rank: int, size: int) -> None:
        self.mail, self.rank, self.size = mail, rank, size

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

        def finish() -> None:
            for source, like in receives:
                try:
                    sent = self.mail.box(source, self.rank).get(timeout=TIMEOUT)
                except queue.Empty:
                    raise RuntimeError(
                        f"{what}: rank {self.rank} of {self.size} lost rank {source}"
                    ) from None
                assert sent.shape == like.shape and sent.dtype == like.dtype, what
                like.copy_(sent)

        return Pending([like for _, like in receives], finish)


def run_ranks(size: int | tuple[int, int], work: Callable[[Transport | Grid], R]) -> list[R]:
    """work(transport) on `size` ranks at once, results by rank; of (rows, columns), on a mesh.

    Raises what a rank raised.
    """
    rows, columns = (size, 1) if isinstance(size, int) else size
    lines = [("column", c) for c in range(columns)] + [("row", r) for r in range(rows)]
    mails = {line: _Mail() for line in lines}
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def main(row: int, column: int) -> None:
        ring = ThreadTransport(mails["column", column], row, rows)
        heads = ThreadTransport(mails["row", row], column, columns)
        transport = ring if isinstance(size, int) else Grid(ring, heads)
        try:
            results[row * columns + column] = work(transport)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=main, args=(r, c)) for r in range(rows) for c in range(columns)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(rows * columns)]
