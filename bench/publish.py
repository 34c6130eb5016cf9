"""Writes the measured results into docs/ and README.md: `make results`, `python -m bench.publish`.

Every number there comes from a file in bench/results; a test compares. Options measure or count
first: --run this machine's ops and models (with options of the bench, such as --threads 1),
--count the costs of the CUDA kernels; --floor takes this machine's CPU run as the floor of
`make bench-check`.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch

from bench import counted, plot
from bench.check import floor_of
from bench.record import RESULTS, ROOT, Row, Run, committed, load, new_run, save, slug
from bench.run import main as run_bench
from bench.show import ceilings_line, markdown, title, wrong_rivals

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
FLOOR = ROOT / "bench" / "floor.json"
ALONE = "ring_attention's ranks one by one, against one `ops.attention`,"  # not PyTorch
NO_RUN = "No run has been committed yet."
HOW = """Written by `make results` from the runs in `bench/results/`; nothing here is typed by hand.

Variants take turns within one run; a time is the median over the turns. A variant's results are
compared with eager PyTorch's before it is timed. "% ceiling" compares with the time that the
machine's own copy and matrix product, measured in the same run, would take for the bytes and FLOPs
that the op cannot avoid; data that fits a cache can exceed 100 %. MB: the most that one call
allocates through PyTorch, its results included. "x best rival" names the fastest other variant that
was right; above 1, vlmkernels is faster."""
COUNTED = """## Counted, not measured

What each CUDA kernel costs in a small call, counted without a GPU: registers, shared memory and
stack (spills would be there) by the compiler, the rest by executing it on an emulated CUDA runtime.
"floor us" is what the busiest unit of an {gpu} needs for these counts at its full rate on all SMs;
it ignores latency, DRAM and launches, and is no prediction. Commit {commit}."""


def results_page(root: Path, runs: list[tuple[str, Run]]) -> str:
    parts = ["# Measured results", HOW]
    for name, run in runs:
        versions = ", ".join(f"{package} {v}" for package, v in run["versions"].items())
        parts += [f"## {run['machine']}: {name.split('/')[-1]}", f"{title(run)}. {versions}."]
        parts += [f"Ceilings: {ceilings_line(run)}.", markdown(run)]
        parts += sorted({row["note"] for row in run["rows"] if "note" in row})
        wrong = wrong_rivals(run)
        if wrong:
            parts.append("Wrong, and not timed:\n" + "\n".join(f"- {line}" for line in wrong))
        pictures = sorted(_pictures(root, name).glob("*.png"))
        parts += [f"![{p.stem}]({p.relative_to(root / 'docs')})" for p in pictures]
    parts += [] if runs else [NO_RUN]
    if counted.RESULT.exists():
        parts.append(_counted_section(json.loads(counted.RESULT.read_text())))
    return "\n\n".join(parts) + "\n"


def _pictures(root: Path, name: str) -> Path:
    return root / "docs" / "pictures" / name.replace("/", "_")


def _counted_section(document: Run) -> str:
    lines = ["| " + " | ".join(counted.HEAD) + " |", "|" + "---|" * len(counted.HEAD)]
    lines += ["| " + " | ".join(counted.cells(row)) + " |" for row in document["rows"]]
    text = COUNTED.format(gpu=document["gpu"]["name"], commit=document["commit"])
    return text + "\n\n" + "\n".join(lines)


def readme_table(runs: list[tuple[str, Run]]) -> str:
    """For every run and op the range of both ratios, the bad ends included."""
    lines = [
        "| op | machine | against eager PyTorch | against the best rival |",
        "|---|---|---|---|",
    ]
    for _, run in runs:
        machine = run["machine"]
        if run["device"] == "cpu":
            machine += f", {run['threads']} threads"
        ops: dict[str, list[Row]] = {}
        for row in run["rows"]:
            if "us" in row:
                name = ALONE if row["op"] == "ring_attention" else row["op"]
                ops.setdefault(f"{name} {row['dtype']}", []).append(row)
        for op, rows in ops.items():
            ranges = [_range([row[part] for row in rows]) for part in ("x_eager", "x_best")]
            lines.append(f"| {op} | {machine} | {ranges[0]} | {ranges[1]} |")
    return "\n".join(lines) if runs else NO_RUN


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f} x" if len(values) > 1 else f"{values[0]:.2f} x"


def with_table(readme: str, table: str) -> str:
    """The README with the text between the markers replaced. Raises ValueError without markers."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", readme)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Path -> what it must contain, for the runs that are committed now."""
    runs = committed()
    readme = root / "README.md"
    return {
        root / "docs" / "results.md": results_page(root, runs),
        readme: with_table(readme.read_text(), readme_table(runs)),
    }


def draw(root: Path = ROOT) -> None:
    """Draws the pictures of all committed runs anew."""
    for name, run in committed():
        folder = _pictures(root, name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, figure in plot.figures(run).items():
            figure.savefig(folder / f"{file}.png", dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="*", metavar="op", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--floor", action="store_true")
    args, options = parser.parse_known_args()
    if options and args.run is None:
        parser.error(f"{' '.join(options)}: only with --run, which passes options of the bench on")
    machine = RESULTS / slug(new_run(args.device)["machine"])
    if args.run is not None:
        file = machine / f"{args.device}.json"
        run_bench([*args.run, *options, "--device", args.device, "--json", str(file)])
    if args.count:
        counted.write(counted.RESULT, counted.count([]))
    if args.floor:
        save(floor_of(load(machine / "cpu.json")), FLOOR)
    draw()
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
