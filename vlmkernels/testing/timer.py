"""Interleaved timing: variants take turns, so that a slow minute of the machine hits all alike.

CPU: the wall clock around repeated calls. CUDA: events around every single call, behind a queue
(the GPU spins until all calls of a round are enqueued, so that launch overhead of the host does not
count), each call after a write of more than the L2 cache. Clocks are left as they are.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of all rounds."""

    median: float
    low: float
    high: float


def time_interleaved(
    variants: Mapping[str, Run],
    *,
    rounds: int = 15,
    min_time: float = 0.02,
    device: str | None = None,
    end_to_end: bool = False,
) -> dict[str, Timing]:
    """Times each variant `rounds` times, in turn; the first two calls of each are not counted.

    A round repeats a variant for min_time seconds. end_to_end: the wall clock with the host's
    share in it, for whole models on a GPU. device: "cpu" or "cuda"; the GPU if there is one.
    """
    cuda = device.startswith("cuda") if device else torch.cuda.is_available()
    sample: Callable[[Run, int], float] = _wall_seconds
    if cuda and not end_to_end:
        sample = _EventSampler()
    elif cuda:
        sample = _synchronized_seconds
    repeats = {}
    for name, run in variants.items():
        run()
        repeats[name] = max(1, int(min_time / max(sample(run, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].append(sample(run, repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _wall_seconds(run: Run, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _synchronized_seconds(run: Run, repeats: int) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


class _EventSampler:
    """Seconds per call by CUDA events; each call finds an L2 cache full of something else."""

    # A round of more calls than this would fill the launch queue, and the host would wait.
    MAX_REPEATS = 32
    # The spin counts clock cycles; no GPU ticks faster.
    CYCLES_PER_SECOND = 2_500_000_000

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flush: Tensor = torch.empty(
            2 * max(properties.L2_cache_size, 1 << 25), dtype=torch.int8, device="cuda"
        )

    def __call__(self, run: Run, repeats: int) -> float:
        repeats = min(repeats, self.MAX_REPEATS)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        self._spin(self._enqueue_seconds(run) * repeats)
        for start, end in events:
            self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.fmean(float(start.elapsed_time(end)) for start, end in events) / 1e3

    def _enqueue_seconds(self, run: Run) -> float:
        """What the host needs to enqueue one call, at most; the GPU's share is not in it."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.flush.zero_()
        run()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return 1.5 * seconds + 20e-6

    def _spin(self, seconds: float) -> None:
        # Bounded, because a call that waits for the GPU itself needs no queue and has no end to it.
        torch.cuda._sleep(int(min(seconds, 0.1) * self.CYCLES_PER_SECOND))


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])
