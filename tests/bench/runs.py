"""A made-up run, for tests of what is done with runs."""

from __future__ import annotations

from typing import Any


def row(shape: str = "qwen2vl_7b 512", us: float = 100.0, **fields: Any) -> dict[str, Any]:
    """ours takes us, eager 200, a rival 90; all with a spread of 2 %."""

    def timed(us: float) -> dict[str, Any]:
        return {"us": us, "us_low": 0.98 * us, "us_high": 1.02 * us, "peak_mb": 1.0, "error": 0.0}

    found = {
        **{"op": "attention", "shape": shape, "dtype": "float32", "direction": "fwd"},
        **{"seqlen": 0, "bytes": 10**6, "flops": 10**9, **timed(us), "rivals": {}},
        **{"tflops": 1e3 / us, "gbps": 1e3 / us, "pct_ceiling": 50.0},
        **{"x_eager": 200 / us, "x_best": 90 / us, "best": "SDPA flash"},
    }
    found["rivals"] = {
        "eager": timed(200.0),
        "SDPA flash": timed(90.0),
        "FlexAttention": {"failed": "wrong: error 0.7", "error": 0.7},
    }
    return {**found, **fields}


def run(*rows: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    return {
        **{"machine": "Some CPU, 2 cores", "device": device, "threads": 2, "load": 0.1},
        **{"versions": {"torch": "2.13.0"}, "commit": "0123abc", "date": "2026-11-23"},
        "complete": True,
        "ceilings": {"float32": {"copy_gbps": 10.0, "gemm_tflops": 0.1}},
        "rows": list(rows),
    }
