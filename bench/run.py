"""Measures ops and whole models against their rivals, interleaved, and tells what was measured.

  vlmkernels bench                      every op and model on this machine
  vlmkernels bench attention norm       some of them
  vlmkernels bench --check old.json     also compare: exit code 1 when something became slower
  vlmkernels bench --from run.json --plot DIR    pictures and a report of a saved run

Correctness comes before timing: a variant that does not agree with eager PyTorch is reported as
wrong. Ctrl-C keeps what was measured. Also: python -m bench.run.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import bench.distributed
import bench.models
import bench.ops
from bench import check, rivals
from bench.case import Case
from bench.measure import ceilings, measure
from bench.record import Run, load, new_run, save
from bench.show import table
from vlmkernels.testing.shapes import CODEBOOKS, SHAPES

PACKAGES = (bench.ops, bench.distributed, bench.models)
NAMED = (*SHAPES, *CODEBOOKS)
# On the CPU one shape of each op of these is measured in bfloat16 as well.
SAMPLED = (
    *("activation", "attention", "contrastive_loss", "norm", "patch_embed", "rope"),
    "vq_lookup",
)
DIRECTIONS = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ()}


def names() -> list[str]:
    """What can be measured: the rooms, what spans ranks, the models."""
    return [m.name for package in PACKAGES for m in pkgutil.iter_modules(package.__path__)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmkernels bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="op", help=f"of {', '.join(names())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", choices=DIRECTIONS, default="both")
    parser.add_argument("--dtype", default="", help="float32,bfloat16,...: all cases")
    parser.add_argument("--shapes", default="", help=f"of {','.join(NAMED)}")
    parser.add_argument("--rivals", default="all", help="all, none, or names: 'SDPA flash,Liger'")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every variant")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; default: torch's")
    parser.add_argument("--from", dest="source", type=Path, help="a saved run; measure nothing")
    parser.add_argument("--json", type=Path, help="write the run here, after every row")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="pictures and report.html")
    parser.add_argument("--check", type=Path, metavar="OLD", help="compare with this run")
    return parser


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(names()))
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; there are {', '.join(names())}")
    args.shapes = [s for s in args.shapes.split(",") if s]
    unknown = sorted(set(args.shapes) - set(NAMED))
    if unknown:
        parser.error(f"unknown shape {', '.join(unknown)}; there are {', '.join(NAMED)}")
    default = "bfloat16" if args.device.startswith("cuda") else "float32"
    args.dtypes = [getattr(torch, name, None) for name in (args.dtype or default).split(",")]
    args.sample = not args.dtype and not args.device.startswith("cuda")
    if not all(isinstance(dtype, torch.dtype) for dtype in args.dtypes):
        parser.error(f"unknown dtype in {args.dtype!r}")
    for option, least in (("rounds", 1), ("threads", 0)):
        if (value := getattr(args, option)) < least:
            parser.error(f"--{option}: expected at least {least}, got {value}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device that torch can use")
    return args


def _modules(chosen: Sequence[str]) -> list[Any]:
    found = []
    for package in PACKAGES:
        for module in pkgutil.iter_modules(package.__path__):
            if not chosen or module.name in chosen:
                found.append(importlib.import_module(f"{package.__name__}.{module.name}"))
    return found


def _wanted(case: Case, args: argparse.Namespace) -> bool:
    if args.shapes and case.shape.split()[0] not in args.shapes:
        return False
    directions = DIRECTIONS[args.mode]
    return case.tokens > 0 or not directions or case.direction in directions


def _chosen_rivals(args: argparse.Namespace) -> list[rivals.Rival]:
    if args.rivals == "none":
        return []
    here = rivals.available(args.device)
    if args.rivals == "all":
        return here
    wanted = set(args.rivals.split(","))
    unknown = sorted(wanted - {r.name for r in here})
    if unknown:
        there = ", ".join(sorted({r.name for r in here}))
        raise ValueError(f"--rivals: expected some of {there}, got {', '.join(unknown)}")
    return [r for r in here if r.name in wanted]


def _sample(module: Any, args: argparse.Namespace) -> Iterator[Case]:
    """The first shape of each op in bfloat16, where the options leave that to the bench."""
    if not args.sample or module.__name__.rpartition(".")[2] not in SAMPLED:
        return
    first: dict[str, str] = {}
    for case in module.cases(args.device, torch.bfloat16):
        if first.setdefault(case.op, case.shape) == case.shape:
            yield case


def _cases(args: argparse.Namespace, progress: Progress, task: Any) -> Iterator[Case]:
    for module in _modules(args.names):
        for dtype in args.dtypes:
            for case in chain(module.cases(args.device, dtype), _sample(module, args)):
                if _wanted(case, args):
                    label = f"{case.op} {case.shape} {case.dtype} {case.direction}"
                    progress.update(task, description=label)
                    yield case
            progress.advance(task)


def run_all(args: argparse.Namespace, console: Console) -> Run:
    """Measures what the options ask for; after every row the run is on disk."""
    run, here = new_run(args.device), _chosen_rivals(args)
    columns = (BarColumn(20), TextColumn("{task.completed}/{task.total} files"))
    columns += (TimeElapsedColumn(), TextColumn("{task.description}"))  # type: ignore[assignment]
    total = len(_modules(args.names)) * len(args.dtypes)
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("copy and matrix product", total=total)
            for dtype in args.dtypes + [torch.bfloat16] * args.sample:
                run["ceilings"][_name(dtype)] = ceilings(args.device, dtype)
            for case in _cases(args, progress, task):
                others = rivals.variants(case, here)
                ceiling = run["ceilings"][case.dtype]
                options = {"device": args.device, "rivals": others, "rounds": args.rounds}
                run["rows"].append(measure(case, ceiling, **options))
                if args.json:
                    save(run, args.json)
            run["complete"] = True
    except KeyboardInterrupt:
        console.print(f"stopped: keeping the {len(run['rows'])} rows that were measured")
    if args.json:
        save(run, args.json)
    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> None:
    args = _options(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    before = load(args.check) if args.check else None  # a wrong file is known before the long run
    console = Console(width=None if sys.stdout.isatty() else 170)
    run = load(args.source) if args.source else run_all(args, console)
    console.print(table(run))
    if args.plot:
        from bench.report import write_report

        console.print(f"report: {write_report(run, args.plot)}")
    failed = [row for row in run["rows"] if "failed" in row]
    for row in failed:
        console.print(f"FAILED {check.key(row)}: {row['failed']}")
    slower = []
    if before is not None:
        slower = check.regressions(run, before)
        console.print(check.summary(run, before, slower))
    if failed or slower:
        sys.exit(1)


if __name__ == "__main__":
    main()
