"""Pictures of a run, as matplotlib figures: roofline, ratio to the best rival, time against length.

All axes of time and rate are logarithmic, ratios have a line at 1, and every picture says on which
machine it was measured.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.measure import EAGER, OURS
from bench.record import Row, Run
from bench.show import title

OUR_COLOR = "#1b6ca8"
COLORS = ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#b5651d", "#2e4057", "#c38d9e")
EAGER_COLOR, WITHIN_SPREAD = "#7a7a7a", "#a9b4bd"


def number(value: float, _: Any = None) -> str:
    """Without exponents: 2,900 and 5.62 and 0.001."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def figures(run: Run) -> dict[str, Figure]:
    """File name without suffix -> figure; only what the rows of the run can show."""
    timed = [row for row in run["rows"] if "us" in row]
    found = {}
    for op, rows in _groups(timed, "op"):
        if any(row["bytes"] and row["flops"] for row in rows):
            found[f"roofline_{op}"] = roofline(run, op, rows)
        if any("seqlen" in row and row["seqlen"] for row in rows):
            found |= lengths(run, op, rows)
        found[f"ratio_{op}".replace(" ", "_")] = ratios(run, op, rows)
    return found


def _groups(rows: list[Row], part: str) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[part]].append(row)
    yield from groups.items()


def variants(row: Row) -> dict[str, Row]:
    """Ours and the rivals of a row that were timed."""
    timed = {name: rival for name, rival in row["rivals"].items() if "us" in rival}
    return {OURS: row, **timed}


def colors(rows: list[Row]) -> dict[str, str]:
    """One color for each variant, the same in all pictures of these rows."""
    names = sorted({name for row in rows for name in variants(row)} - {OURS, EAGER})
    fixed = {OURS: OUR_COLOR, EAGER: EAGER_COLOR}
    return fixed | {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def roofline(run: Run, op: str, rows: list[Row]) -> Figure:
    """FLOP rate against FLOPs per byte, under the machine's own copy and matrix product."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    rows = [row for row in rows if row["bytes"] and row["flops"]]
    palette = colors(rows)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ridges = [
        c["gemm_tflops"] * 1e3 / c["copy_gbps"]
        for dtype, c in run["ceilings"].items()
        if any(row["dtype"] == dtype for row in rows)
    ]
    left, right = min(intensities + ridges) / 3, max(intensities + ridges) * 3
    dashes = ("-", "--", ":")
    for style, dtype in zip(dashes, sorted({row["dtype"] for row in rows}), strict=False):
        c = run["ceilings"][dtype]
        ridge = c["gemm_tflops"] * 1e3 / c["copy_gbps"]
        x = [left, ridge, right]
        y = [min(c["gemm_tflops"], c["copy_gbps"] * i / 1e3) for i in x]
        text = (
            f"{dtype}: copy {number(c['copy_gbps'])} GB/s, GEMM {number(c['gemm_tflops'])} TFLOP/s"
        )
        axes.plot(x, y, style, color="black", linewidth=1, label=text)
    for name, color in palette.items():
        size, order = (46, 3) if name == OURS else (22, 2)
        axes.scatter([], [], s=size, color=color, label=name)
        for marker, backward in (("o", False), ("^", True)):
            points = [
                (row["flops"] / row["bytes"], row["flops"] / variants(row)[name]["us"] / 1e6)
                for row in rows
                if name in variants(row) and (row["direction"] == "bwd") == backward
            ]
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.scatter(x, y, s=size, color=color, marker=marker, zorder=order)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOP per byte that must move (backward: triangles)")
    axes.xaxis.set_major_formatter(FuncFormatter(number))
    return _finish(figure, axes, run, f"{op}: roofline")


def ratios(run: Run, op: str, rows: list[Row]) -> Figure:
    """Time of the best rival over ours, a bar from 1 for each row; the spread as a thin line."""
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.4 * len(rows)), layout="constrained")
    values = [row["x_best"] for row in rows]
    ends = [_spread(row) for row in rows]
    shades = [
        OUR_COLOR if low > 1 else COLORS[0] if high < 1 else WITHIN_SPREAD for low, high in ends
    ]
    axes.barh(range(len(rows)), [v - 1 for v in values], left=1, color=shades, height=0.65)
    for i, (row, (low, high)) in enumerate(zip(rows, ends, strict=True)):
        axes.plot((low, high), (i, i), color="black", linewidth=0.8)
        axes.annotate(
            f"{row['x_best']:.2f}  {row['best']}", (max(high, 1), i), (4, 0), fontsize=8,
            textcoords="offset points", va="center",
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    labels = [f"{row['shape']}  {row['dtype']} {row['direction']}" for row in rows]
    labels = [textwrap.fill(label, 48) for label in labels]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    left, right = min(1, *(low for low, _ in ends)), max(1, *(high for _, high in ends))
    axes.set_xscale("log")
    axes.set_xlim(left / 1.1, 1.1 * right * (right / left) ** 0.35)  # room for the texts
    wide = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    narrow = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 2.5)
    steps = wide if right > 3 * left else narrow
    ticks = [tick for tick in steps if left / 1.1 < tick < 1.3 * right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of the best rival / time of vlmkernels (gray: 1 is within the spread)")
    _heading(axes, run, f"{op}: against the best rival, above 1 vlmkernels is faster")
    return figure


def _spread(row: Row) -> tuple[float, float]:
    """The ratio at the quartiles of both that are worst and best for us."""
    best = row["rivals"][row["best"]]
    return best["us_low"] / row["us_high"], best["us_high"] / row["us_low"]


def lengths(run: Run, op: str, rows: list[Row]) -> dict[str, Figure]:
    """Time against sequence length, one figure for each named shape measured at several lengths."""
    found = {}
    kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["seqlen"]:
            kinds[(row["shape"].split()[0], row["dtype"], row["direction"])].append(row)
    palette = colors(rows)
    for (shape, dtype, direction), line in kinds.items():
        if len({row["seqlen"] for row in line}) > 1:
            name = f"length_{op}_{shape}_{dtype}_{direction}"
            found[name] = _length(run, f"{op} {shape} {dtype} {direction}", line, palette)
    return found


def _length(run: Run, name: str, rows: list[Row], palette: dict[str, str]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    rows = sorted(rows, key=lambda row: row["seqlen"])
    timed = {variant for row in rows for variant in variants(row)}
    for variant, color in palette.items():
        if variant not in timed:
            continue
        points = [
            (row["seqlen"], variants(row)[variant]) for row in rows if variant in variants(row)
        ]
        x, times = [p[0] for p in points], [p[1] for p in points]
        us = [t["us"] for t in times]
        errors = [
            [t["us"] - t["us_low"] for t in times],
            [t["us_high"] - t["us"] for t in times],
        ]
        text = variant + (f" (last slope {_slope(x, us):.2f})" if len(x) > 1 else "")
        width = 2.0 if variant == OURS else 1.2
        axes.errorbar(x, us, errors, color=color, marker="o", linewidth=width, label=text)
    axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="microseconds")
    ticks = sorted({row["seqlen"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    return _finish(figure, axes, run, name)


def _slope(x: list[int], y: list[float]) -> float:
    """Exponent of the growth between the last two points."""
    from math import log

    return log(y[-1] / y[-2]) / log(x[-1] / x[-2])


def _finish(figure: Figure, axes: Any, run: Run, heading: str) -> Figure:
    axes.grid(which="major", linewidth=0.4, alpha=0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _heading(axes, run, heading)
    return figure


def _heading(axes: Any, run: Run, heading: str) -> None:
    axes.set_title(f"{heading}\n", fontsize=11, loc="left")
    place = {"xytext": (0, 5), "textcoords": "offset points", "xycoords": "axes fraction"}
    axes.annotate(title(run), (0, 1), fontsize=7, color="#555555", **place)
