"""Compares two runs: what became slower beyond the spread of the measurement.

On a GPU times are compared. On a CPU, whose speed other work on the machine changes, it is the
ratio to eager PyTorch, measured in the same minute: it must not fall by more than a fifth.
"""

from bench.record import Row, Run, key

__all__ = ["key", "regressions", "summary"]

CPU_SLACK, GPU_SLACK = 0.20, 0.03


def regressions(new: Run, old: Run) -> list[str]:
    """One line for each row of `old` that `new` measured to be slower, or to fail."""
    before = {key(row): row for row in old["rows"]}
    slower = _slower_time if new["device"].startswith("cuda") else _slower_ratio
    found: list[str] = []
    if not before.keys() & {key(row) for row in new["rows"]}:
        return ["nothing to compare: the runs have no row in common"]
    for row in new["rows"]:
        reference = before.get(key(row))
        if reference is None or "x_eager" not in reference:
            continue
        why = f"failed: {row['failed']}" if "failed" in row else slower(row, reference)
        if why:
            found.append(f"{key(row)}: {why}")
    return found


def _slower_ratio(new: Row, old: Row) -> str:
    """The ratio at the good end of its spread must be within the slack of the old one."""
    eager = new["rivals"]["eager"]
    best_case = eager["us_high"] / new["us_low"]
    floor = old["x_eager"] * (1 - CPU_SLACK)
    if new["x_eager"] < floor and best_case < old["x_eager"]:
        return f"{new['x_eager']:.2f} x eager, floor {old['x_eager']:.2f} less {CPU_SLACK:.0%}"
    return ""


def _slower_time(new: Row, old: Row) -> str:
    if new["us_low"] > old["us_high"] and new["us"] > old["us"] * (1 + GPU_SLACK):
        return f"{new['us']:.1f} us, was {old['us']:.1f} us"
    return ""


def summary(new: Run, old: Run, slower: list[str]) -> str:
    """What was compared and what was found, as text."""
    common = {key(row) for row in new["rows"]} & {key(row) for row in old["rows"]}
    of = f"{len(common)} rows of {len(old['rows'])}"
    lines = [f"compared {of} with {old.get('machine', 'the old run')}"]
    lines += [f"SLOWER {line}" for line in slower] or ["nothing became slower beyond the spread"]
    return "\n".join(lines)


def floor_of(run: Run) -> Run:
    """The part of a run that a committed floor keeps: keys and ratios to eager."""
    parts = ("op", "shape", "dtype", "direction", "x_eager")
    rows = [{part: row[part] for part in parts} for row in run["rows"] if "x_eager" in row]
    return {"machine": run["machine"], "date": run["date"], "device": run["device"], "rows": rows}
