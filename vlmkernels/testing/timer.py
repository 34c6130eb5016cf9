"""Interleaved timing: variants take turns, so that a slow minute of the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of all rounds."""

    median: float
    low: float
    high: float


def time_interleaved(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 15, min_time: float = 0.02
) -> dict[str, Timing]:
    """Times each variant `rounds` times, in turn; the first call of each is not counted.

    A round repeats a variant for min_time seconds. With a GPU, CUDA events time each round.
    """
    repeats = {}
    for name, run in variants.items():
        run()
        repeats[name] = max(1, int(min_time / max(_seconds(run, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].append(_seconds(run, repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    if torch.cuda.is_available():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])
