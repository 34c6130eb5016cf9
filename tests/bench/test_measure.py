"""Rows: what is right is timed, what is wrong is named; memory and rates are counted right."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.case import Case, both_directions, forward, gradient
from bench.measure import NotSupportedError, ceilings, floor_seconds, measure, relative_error
from vlmkernels.testing import timer
from vlmkernels.testing.memory import peak_bytes

CEILING = {"copy_gbps": 10.0, "gemm_tflops": 0.1}


def case(variants: dict[str, Callable[[], Any]], **fields: Any) -> Case:
    text = {"op": "op", "shape": "s 1", "dtype": "float32", "direction": "fwd"}
    return Case(**text, bytes=8000, flops=0, variants=variants, **fields)


def test_a_wrong_rival_is_reported_with_its_error_and_not_timed() -> None:
    x = torch.randn(1000)
    calls = []

    def wrong() -> torch.Tensor:
        calls.append(1)
        return x + 0.5 * float(x.abs().max())

    def unable() -> torch.Tensor:
        raise NotSupportedError("head_dim 80")

    def broken() -> torch.Tensor:
        raise RuntimeError("out of luck\nwith details")

    def nan() -> torch.Tensor:
        return torch.full_like(x, torch.nan)

    rivals = {"wrong": wrong, "unable": unable, "broken": broken, "nan": nan, "right": x.clone}
    row = measure(case({"vlmkernels": x.clone, "eager": x.clone}), CEILING, rivals=rivals, rounds=2)
    assert row["rivals"]["wrong"] == {"failed": "wrong: error 0.5", "error": pytest.approx(0.5)}
    assert len(calls) == 1
    assert row["rivals"]["unable"] == {"failed": "head_dim 80"}
    assert row["rivals"]["broken"] == {"failed": "RuntimeError: out of luck"}
    assert row["rivals"]["nan"]["failed"] == "wrong: error inf"
    assert row["best"] in ("right", "eager")
    assert row["rivals"]["right"]["us"] > 0


def test_ours_being_wrong_is_a_failed_row() -> None:
    x = torch.randn(10)
    row = measure(case({"vlmkernels": lambda: 2 * x, "eager": x.clone}), CEILING, rounds=1)
    assert row["failed"].startswith("wrong: error 1")
    assert "us" not in row and "x_best" not in row


def test_eager_that_fails_is_a_failed_row() -> None:
    def broken() -> None:
        raise MemoryError("no room")

    row = measure(case({"vlmkernels": lambda: None, "eager": broken}), CEILING)
    assert row["failed"] == "eager: MemoryError: no room"


def test_rates_and_ratios() -> None:
    """A variant of known duration: 2 ms against 6 ms."""
    x = torch.zeros(1)

    def lasting(seconds: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            return x

        return run

    variants = {"vlmkernels": lasting(2e-3), "eager": lasting(6e-3)}
    row = measure(case(variants, tokens=40), CEILING, rounds=3)
    assert row["us"] >= 2000
    assert row["x_eager"] == pytest.approx(row["rivals"]["eager"]["us"] / row["us"])
    assert row["x_best"] == row["x_eager"] and row["best"] == "eager"
    assert row["gbps"] == pytest.approx(8000 / row["us"] / 1e3)
    assert row["tokens_per_s"] == pytest.approx(40e6 / row["us"])
    floor = floor_seconds(8000, 0, CEILING)
    assert floor == pytest.approx(0.8e-6)
    assert row["pct_ceiling"] == pytest.approx(100e6 * floor / row["us"])


def test_relative_error() -> None:
    y = torch.tensor([1.0, -4.0, torch.inf])
    assert relative_error([y], [y]) == 0
    assert relative_error([torch.tensor([2.0, -4.0, torch.inf])], [y]) == 0.25
    assert relative_error([torch.tensor([1.0, -4.0, 5.0])], [y]) == torch.inf
    assert relative_error([torch.empty(0)], [torch.empty(0)]) == 0
    with pytest.raises(ValueError, match="1 results, expected 2"):
        relative_error([y], [y, y])


def test_gradient_gives_every_variant_the_same_dy() -> None:
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    inputs = {"x": x, "w": w, "scale": 2.0}

    def one(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        return x * w * scale

    def other(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        return (x * scale) * w

    results = [gradient(f, inputs)() for f in (one, other)]
    assert [g.shape for g in results[0]] == [x.shape, w.shape]
    assert results[0][1].abs().max() > 0.1
    assert relative_error(list(results[0]), list(results[1])) < 1e-6
    assert x.grad is None and not forward(one, inputs)().requires_grad


def test_both_directions_measures_an_op() -> None:
    x = torch.randn(4096, requires_grad=True)
    fields = {"op": "null", "shape": "4096", "dtype": "float32"}
    found = list(
        both_directions("null", {"x": x}, lambda x: x.clone(), bytes=(1, 2), flops=(3, 4), **fields)
    )
    assert [(c.direction, c.bytes, c.flops) for c in found] == [("fwd", 1, 3), ("bwd", 2, 4)]
    for c in found:
        row = measure(c, CEILING, rounds=1)
        assert row["error"] == 0 and row["peak_mb"] == pytest.approx(4096 * 4 / 1e6)


def test_peak_bytes_counts_what_lives_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.ones(1000)
        b = torch.ones(2000)
        del a
        c = torch.ones(500)
        b[0] = 2
        del c
        return b

    assert peak_bytes(run) == 4 * 3000


def test_ceilings_are_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    second = timer.Timing(1.0, 1.0, 1.0)
    monkeypatch.setattr(
        "bench.measure.time_interleaved", lambda runs, **_: dict.fromkeys(runs, second)
    )
    found = ceilings("cpu", torch.bfloat16)
    assert found["copy_gbps"] == pytest.approx(2 * 2**27 / 1e9)
    assert found["gemm_tflops"] == pytest.approx(2 * 1536**3 / 1e12)


def test_cuda_timing_flushes_and_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on a GPU, with a GPU made of paper: spin, then flush, event, call, event."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: object) -> float:
            return 3.0  # milliseconds

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")

    cuda = {
        "Event": Event,
        "_sleep": lambda cycles: log.append("spin" if cycles > 0 else "no spin"),
        "synchronize": lambda: log.append("wait"),
        "current_device": lambda: 0,
        "get_device_properties": lambda i: SimpleNamespace(L2_cache_size=50 << 20),
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda size, **_: Buffer() if size >= 100 << 20 else None)
    run = lambda: log.append("call")  # noqa: E731
    times = timer.time_interleaved({"a": run}, rounds=2, min_time=0.006, device="cuda")
    assert times["a"].median == pytest.approx(3e-3)
    one = ["flush", "event", "call", "event"]
    assert log[-10:] == ["wait", "spin", *one, *one, "wait"][-10:]
    assert log.count("call") == 1 + (1 + 1) + 2 * (1 + 2)


def test_float32_decides_where_both_are_rounded() -> None:
    """Eager code that is off by 20 % makes no better variant wrong and no worse one right."""
    x = torch.linspace(1, 2, 64).to(torch.bfloat16)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return x * 1.2 if x.dtype == torch.bfloat16 else x

    variants: dict[str, Callable[[], Any]] = {
        "vlmkernels": x.clone,
        "eager": lambda: eager(x),
        "worse": lambda: x * 1.5,
    }
    text = {"op": "op", "shape": "s 1", "dtype": "bfloat16", "direction": "fwd"}
    given = Case(**text, bytes=1, flops=0, variants=variants, inputs={"x": x}, eager=eager)
    row = measure(given, CEILING, rounds=1)
    assert "failed" not in row and row["error"] > 0.1
    assert row["rivals"]["worse"]["failed"].startswith("wrong")
    indices = {"vlmkernels": lambda: torch.tensor([1, 2]), "eager": lambda: torch.tensor([1, 3])}

    def exact(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1, 2])

    given = Case(**text, bytes=1, flops=0, variants=indices, inputs={"x": x}, eager=exact)
    assert "failed" not in measure(given, CEILING, rounds=1)
