"""The table of a run: on the terminal and in Markdown."""

from rich.table import Table

from bench.record import Row, Run

HEAD = (
    *(
        "op",
        "shape",
        "dtype",
        "dir",
        "us",
        "TFLOP/s",
        "GB/s",
        "tokens/s",
        "% ceiling",
        "MB",
        "x eager",
    ),
    "x best rival",
)


def title(run: Run) -> str:
    cpu = run["device"] == "cpu"
    threads = f", {run['threads']} threads, load {run['load']:.1f} before" if cpu else ""
    commit = f", commit {run['commit']}" if run["commit"] else ""
    stopped = "" if run["complete"] else ", stopped early"
    torch_version = run["versions"].get("torch", "?")
    return f"{run['machine']}{threads}, torch {torch_version}, {run['date']}{commit}{stopped}"


def ceilings_line(run: Run) -> str:
    """What "% ceiling" is a percentage of."""
    parts = [
        f"{dtype}: copy {c['copy_gbps']:.1f} GB/s, matrix product {c['gemm_tflops']:.3g} TFLOP/s"
        for dtype, c in run["ceilings"].items()
    ]
    return "; ".join(parts)


def cells(row: Row) -> list[str]:
    """The cells of one row, in the order of HEAD."""
    head = [row["op"], row["shape"], row["dtype"], row["direction"]]
    if "us" not in row:
        return [*head, "failed", *[""] * (len(HEAD) - 5)]
    return [
        *head,
        time(row["us"]),
        f"{row['tflops']:.3g}" if row["flops"] else "",
        f"{row['gbps']:.1f}" if row["bytes"] else "",
        f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else "",
        f"{row['pct_ceiling']:.0f}" if "pct_ceiling" in row else "",
        f"{row['peak_mb']:.1f}",
        f"{row['x_eager']:.2f}",
        f"{row['x_best']:.2f} {row['best']}",
    ]


def time(us: float) -> str:
    """Microseconds with three digits."""
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def table(run: Run) -> Table:
    view = Table(title=title(run), caption="ceilings: " + ceilings_line(run))
    for i, column in enumerate(HEAD):
        view.add_column(column, justify="right" if 4 <= i < len(HEAD) - 1 else "left")
    for row in run["rows"]:
        view.add_row(*cells(row))
    return view


def markdown(run: Run) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * 4 + "---:|" * (len(HEAD) - 4)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in run["rows"]]
    return "\n".join(lines)


def wrong_rivals(run: Run) -> list[str]:
    """Lines about rivals that gave wrong results: these are never timed."""
    found = []
    for row in run["rows"]:
        for name, rival in row["rivals"].items():
            if rival.get("failed", "").startswith("wrong"):
                shape = f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}"
                found.append(f"{name}, {shape}: {rival['failed']}")
    return found
