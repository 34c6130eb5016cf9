"""Writes the measured results into docs/results.md and README.md: `python -m bench.publish`.

Every number there comes from a file in bench/results; a test compares. `--check` only compares.
"""

import argparse
import re
import sys
from pathlib import Path

from bench.record import ROOT, Row, Run, committed
from bench.show import cells, ceilings_line, markdown, title, wrong_rivals

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
HOW = """Written by `make results` from the runs in `bench/results/`; nothing here is typed by hand.

Variants take turns within one run; a time is the median over the turns. A variant's results are
compared with eager PyTorch's before it is timed. "% ceiling" compares with the time that the
machine's own copy and matrix product, measured in the same run, would take for the bytes and FLOPs
that the op cannot avoid; data that fits a cache can exceed 100 %. MB: the most that one call
allocates through PyTorch, its results included. "x best rival" names the fastest other variant that
was right; above 1, vlmkernels is faster."""


def results_page(runs: list[tuple[str, Run]]) -> str:
    parts = ["# Measured results", HOW]
    if not runs:
        parts.append("No run has been committed yet.")
    for name, run in runs:
        versions = ", ".join(f"{package} {v}" for package, v in run["versions"].items())
        parts += [f"## {run['machine']}: {name.split('/')[-1]}", f"{title(run)}. {versions}."]
        parts += [f"Ceilings: {ceilings_line(run)}.", markdown(run)]
        parts += sorted({row["note"] for row in run["rows"] if "note" in row})
        wrong = wrong_rivals(run)
        if wrong:
            parts.append("Wrong, and not timed:\n" + "\n".join(f"- {line}" for line in wrong))
    return "\n\n".join(parts) + "\n"


def readme_table(runs: list[tuple[str, Run]]) -> str:
    """For every run and op the range of ratios: the whole truth in few lines."""
    lines = ["| op | machine | against eager PyTorch | against the best rival |", "|---|---|---|---|"]
    for _, run in runs:
        machine = run["machine"]
        if run["device"] == "cpu":
            machine += f", {run['threads']} threads"
        ops: dict[str, list[Row]] = {}
        for row in run["rows"]:
            if "us" in row:
                ops.setdefault(f"{row['op']} {row['dtype']}", []).append(row)
        for op, rows in ops.items():
            ranges = [_range([row[part] for row in rows]) for part in ("x_eager", "x_best")]
            lines.append(f"| {op} | {machine} | {ranges[0]} | {ranges[1]} |")
    if not runs:
        return "No run has been committed yet."
    return "\n".join(lines)


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
        root / "docs" / "results.md": results_page(runs),
        readme: with_table(readme.read_text(), readme_table(runs)),
    }


def stale(root: Path = ROOT) -> list[Path]:
    """The pages that do not match bench/results."""
    return [path for path, text in pages(root).items() if not path.exists() or path.read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        old = stale()
        sys.exit(f"run `make results`: {', '.join(map(str, old))} do not match" if old else 0)
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
