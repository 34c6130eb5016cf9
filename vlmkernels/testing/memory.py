"""What a call allocates at its peak, beyond what there was before it."""

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Largest sum of bytes that torch's allocator holds for `run()`, its results included.

    Counted, not sampled: CUDA by the caching allocator's statistics, CPU by the allocations and
    releases that torch's profiler records. Memory that a kernel takes elsewhere isn't seen.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return int(peak)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    del result
    held = peak = 0
    results = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)
