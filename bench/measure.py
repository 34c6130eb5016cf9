"""From a case to a row: is it right, what does it hold in memory, how long does it take.

A variant is timed only when it is right: its results must agree with the eager ones. Where both are
rounded to 16 bits and differ by more, float32 decides: a variant is right if it is no further from
it than twice the eager code. One that is wrong, or cannot run the case, is named in the row with
its error or its reason.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, in_float32, tensors
from bench.record import Row
from vlmkernels.testing.compare import assert_as_accurate, max_error
from vlmkernels.testing.memory import peak_bytes
from vlmkernels.testing.timer import Timing, time_interleaved

OURS, EAGER = "vlmkernels", "eager"
# max |x - eager| / max |eager| up to which a variant counts as right: PyTorch itself rounds
# intermediate results to the dtype. The tests hold our ops to float64; here rivals are sorted out.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
HALF = ("float16", "bfloat16")


class NotSupportedError(Exception):
    """A rival does not compute this case; the message says why."""


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """This machine's own copy (GB/s, read and write) and matrix product (TFLOP/s) in this dtype."""
    cuda = device.startswith("cuda")
    num_bytes, n = (1 << 30, 8192) if cuda else (1 << 27, 1536)
    x = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    y = torch.empty_like(x)
    a = torch.randn(n, n, device=device).to(dtype)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: y.copy_(x), "gemm": lambda: a @ a}
    times = time_interleaved(runs, rounds=7, device=device)
    return {
        "copy_gbps": 2 * num_bytes / times["copy"].low / 1e9,
        "gemm_tflops": 2 * n**3 / times["gemm"].low / 1e12,
    }


def measure(
    case: Case,
    ceiling: Mapping[str, float],
    *,
    device: str = "cpu",
    rivals: Mapping[str, Callable[[], Any]] | None = None,
    rounds: int = 15,
) -> Row:
    """Checks, then times all variants of a case and the given rivals, interleaved."""
    variants = {**case.variants, **(rivals or {})}
    try:
        expected = [x.clone() for x in tensors(variants[EAGER]())]
    except Exception as problem:  # out of memory: nothing to compare with
        return _row(case, {OURS: {"failed": f"eager: {_reason(problem)}"}}, ceiling)
    exact = cache(lambda: in_float32(case))
    arbiter = exact if case.eager is not None and case.dtype in HALF else None
    outcomes = {name: _check(run, expected, device, arbiter) for name, run in variants.items()}
    right = {name: run for name, run in variants.items() if "failed" not in outcomes[name]}
    timings = time_interleaved(right, rounds=rounds, device=device, end_to_end=case.tokens > 0)
    for name, timing in timings.items():
        outcomes[name].update(_microseconds(timing))
    return _row(case, outcomes, ceiling)


def _check(
    run: Callable[[], Any],
    expected: list[Tensor],
    device: str,
    exact: Callable[[], list[Tensor]] | None,
) -> Row:
    """{"error", "peak_mb"}, or {"failed": why}. exact: gives the results in float32."""
    try:
        results = tensors(run())
        error = relative_error(results, expected)
        dtype = next((x.dtype for x in expected if x.is_floating_point()), torch.float32)
        close = error <= TOLERANCE[dtype]
        if not close and not (exact and _as_accurate(results, expected, exact())):
            return {"failed": f"wrong: error {error:.2g}", "error": error}
        return {"error": error, "peak_mb": peak_bytes(run, device) / 1e6}
    except Exception as problem:  # a rival may fail in any way; the row says how
        return {"failed": _reason(problem)}


def _as_accurate(results: list[Tensor], expected: list[Tensor], exact: list[Tensor]) -> bool:
    """The error rule of the tests, for every pair; by number where it is no float."""
    for x, eager, true in zip(results, expected, exact, strict=True):
        if not x.is_floating_point():
            if (x != true).sum() > 2 * (eager != true).sum():
                return False
            continue
        try:
            assert_as_accurate("", x, eager.to(x.dtype), true)
        except AssertionError:
            return False
    return True


def _reason(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    kind = "" if isinstance(problem, NotSupportedError) else f"{type(problem).__name__}: "
    return (kind + lines[0])[:160]


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of max|x - y| / max|y| over the pairs; infinity where NaNs differ."""
    if len(results) != len(expected):
        raise ValueError(f"{len(results)} results, expected {len(expected)}")
    errors = [0.0]
    for x, y in zip(results, expected, strict=True):
        if y.numel():
            finite = torch.where(y.isfinite(), y, torch.zeros_like(y))
            scale = float(finite.double().abs().max())
            errors.append(max_error(x, y) / (scale or 1.0))
    return max(errors)


def _microseconds(timing: Timing) -> Row:
    return {"us": timing.median * 1e6, "us_low": timing.low * 1e6, "us_high": timing.high * 1e6}


def _row(case: Case, outcomes: dict[str, Row], ceiling: Mapping[str, float]) -> Row:
    ours = outcomes.pop(OURS)
    row: Row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "seqlen": case.seqlen,
        "bytes": case.bytes,
        "flops": case.flops,
        **({"note": case.note} if case.note else {}),
        **ours,
        "rivals": outcomes,
    }
    if "us" not in ours:
        return row
    seconds = ours["us"] / 1e6
    timed = {name: rival["us"] for name, rival in outcomes.items() if "us" in rival}
    best = min(timed, key=lambda name: timed[name])
    row |= {
        "tflops": case.flops / seconds / 1e12,
        "gbps": case.bytes / seconds / 1e9,
        "x_eager": timed[EAGER] / ours["us"],
        "x_best": timed[best] / ours["us"],
        "best": best,
    }
    if case.bytes or case.flops:
        row["pct_ceiling"] = 100 * floor_seconds(case.bytes, case.flops, ceiling) / seconds
    if case.tokens:
        row["tokens_per_s"] = case.tokens / seconds
    return row


def floor_seconds(num_bytes: int, flops: int, ceiling: Mapping[str, float]) -> float:
    """The time that the slower of moving the bytes and computing the FLOPs takes at the ceiling."""
    memory = num_bytes / (ceiling["copy_gbps"] * 1e9)
    return max(memory, flops / (ceiling["gemm_tflops"] * 1e12))
