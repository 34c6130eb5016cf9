"""README and docs/results.md say what bench/results says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import publish
from bench.record import ROOT, committed
from tests.bench.runs import row, run


def test_the_committed_pages_match_the_committed_runs() -> None:
    old = [path.name for path, text in publish.pages().items() if path.read_text() != text]
    assert old == [], "run `python -m bench.publish`"


def test_committed_runs_are_complete_and_right() -> None:
    for name, done in committed():
        assert done["complete"] and done["commit"], name
        assert [r for r in done["rows"] if "failed" in r] == [], name


def test_pictures_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    assert [
        p for p in re.findall(r"\]\((pictures/[^)]+)\)", text) if not (ROOT / "docs" / p).exists()
    ] == []


def test_page_has_every_row_and_the_wrong_rivals(tmp_path: Path) -> None:
    runs = [("some_cpu/cpu", run(row(), row(shape="vit_b_16_224 197", us=400.0)))]
    page = publish.results_page(tmp_path, runs)
    assert "| attention | qwen2vl_7b 512 | float32 | fwd | 100 | 10 | 10.0 |  | 50 |" in page
    assert "| 2.00 | 0.90 SDPA flash |" in page
    assert (
        "2 threads, load 0.1 before" in page
        and "commit 0123abc" in page
        and "copy 10.0 GB/s" in page
    )
    assert "- FlexAttention, attention vit_b_16_224 197 float32 fwd: wrong: error 0.7" in page


def test_readme_table_shows_the_bad_end_too() -> None:
    table = publish.readme_table([("a/cpu", run(row(), row(us=400.0), row(us=50.0)))])
    assert table.splitlines()[2:] == [
        "| attention float32 | Some CPU, 2 cores, 2 threads | 0.50 to 4.00 x | 0.23 to 1.80 x |"
    ]


def test_readme_is_changed_between_the_markers_only() -> None:
    text = f"a\n{publish.BEGIN}\nold | row\n{publish.END}\nb\n"
    assert publish.with_table(text, "new \\1") == f"a\n{publish.BEGIN}\nnew \\1\n{publish.END}\nb\n"
    with pytest.raises(ValueError, match="expected the markers"):
        publish.with_table("nothing", "new")
