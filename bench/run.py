"""Runs the benches: `python -m bench.run [op ...]`; the variants of a case are interleaved."""

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bench.ops
from bench.case import Case
from vlmkernels.testing.timer import time_interleaved


def room_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(bench.ops.__path__))


def measure(case: Case) -> dict[str, Any]:
    """Times all variants of a case; x_eager > 1 means that ours is faster."""
    timings = time_interleaved(case.variants)
    ours = timings["vlmkernels"]
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "us": ours.median * 1e6,
        "us_low": ours.low * 1e6,
        "us_high": ours.high * 1e6,
        "gflops": case.flops / ours.median / 1e9,
        "gbps": case.bytes / ours.median / 1e9,
        "x_eager": timings["eager"].median / ours.median,
        "others_us": {k: v.median * 1e6 for k, v in timings.items() if k != "vlmkernels"},
    }


def all_cases(rooms: list[str], device: str, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for room in rooms:
        module = importlib.import_module(f"bench.ops.{room}")
        for dtype in dtypes:
            yield from module.cases(device, dtype)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    view = Table(title=title)
    for column in ("op", "shape", "dtype", "dir"):
        view.add_column(column)
    for column in ("us", "GFLOP/s", "GB/s", "x eager"):
        view.add_column(column, justify="right")
    for row in rows:
        view.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            row["direction"],
            f"{row['us']:.1f}",
            f"{row['gflops']:.1f}",
            f"{row['gbps']:.1f}",
            f"{row['x_eager']:.2f}",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"which of {', '.join(room_names())}; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="*", default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    unknown = sorted(set(args.ops) - set(room_names()))
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; there are {', '.join(room_names())}")
    names = args.dtype or (["bfloat16"] if args.device == "cuda" else ["float32"])
    dtypes = [getattr(torch, name) for name in names]
    console, rows = Console(), []
    try:
        with console.status("measuring") as status:
            for case in all_cases(args.ops or room_names(), args.device, dtypes):
                status.update(f"{case.op} {case.shape} {case.dtype} {case.direction}")
                rows.append(measure(case))
    except KeyboardInterrupt:
        console.print("stopped: showing what was measured")
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    console.print(table(rows, f"{args.device}{threads}, torch {torch.__version__}"))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
