"""One HTML file with all of a run in it: table, pictures, what was wrong, how it was measured."""

import html
from pathlib import Path

import matplotlib.pyplot as plt

from bench import plot
from bench.record import Run, save
from bench.show import HEAD, ceilings_line, cells, title, wrong_rivals

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } th, td { padding: 2px 9px; text-align: right }
th { border-bottom: 1px solid #888 } tr:nth-child(even) { background: #f4f6f8 }
td:nth-child(-n+4), th:nth-child(-n+4), td:last-child { text-align: left }
svg { max-width: 100%; height: auto } .small { color: #555; font-size: 13px }
"""
METHOD = """Variants take turns within one run; a time is the median over the turns, the thin lines
and brackets are quartiles. Every variant's result is compared with eager PyTorch's before it is
timed. "% ceiling" compares with the time that this machine's own copy and matrix product, measured
in the same run, would take for the bytes and FLOPs that the op cannot avoid; data that fits a cache
can exceed 100 %. MB: the most that one call allocates through PyTorch, its results included."""


def write_report(run: Run, directory: Path) -> Path:
    """Writes report.html, the run's JSON and every picture as SVG and PNG; returns report.html."""
    directory.mkdir(parents=True, exist_ok=True)
    save(run, directory / "run.json")
    pictures = []
    for name, figure in plot.figures(run).items():
        figure.savefig(directory / f"{name}.png", dpi=130, bbox_inches="tight")
        figure.savefig(directory / f"{name}.svg", bbox_inches="tight")
        svg = (directory / f"{name}.svg").read_text()
        pictures.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
        plt.close(figure)
    path = directory / "report.html"
    path.write_text(_page(run, pictures), encoding="utf-8")
    return path


def _page(run: Run, pictures: list[str]) -> str:
    def line(tag: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(t)}</{tag}>" for t in texts) + "</tr>"

    rows = "\n".join(line("td", cells(row)) for row in run["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    notes = sorted({row["note"] for row in run["rows"] if "note" in row})
    wrong = "".join(f"<li>{html.escape(text)}</li>" for text in wrong_rivals(run))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vlmkernels bench</title>
<style>{STYLE}</style></head><body>
<h1>vlmkernels bench</h1>
<p>{html.escape(title(run))}</p>
<p class="small">{html.escape(versions)}<br>{html.escape(ceilings_line(run))}</p>
<p class="small">{html.escape(METHOD)} {html.escape(" ".join(notes))}</p>
<table>{line("th", list(HEAD))}
{rows}</table>
{f"<h2>Rivals that were wrong, and not timed</h2><ul>{wrong}</ul>" if wrong else ""}
{"".join(pictures)}
</body></html>
"""
