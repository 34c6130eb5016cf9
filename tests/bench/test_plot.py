"""Pictures show the numbers of the run; the report holds all of it in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from bench import plot
from bench.report import write_report
from tests.bench.runs import row, run


@pytest.fixture
def sweep() -> dict[str, Any]:
    """Quadratic in the length, so that slopes are known."""
    rows = [row(f"qwen2vl_7b {n}", us=n * n / 1e3, seqlen=n) for n in (512, 1024, 2048)]
    return run(*rows, row("plain", op="norm", flops=0))


def test_figures_of_a_run(sweep: dict[str, Any]) -> None:
    figures = plot.figures(sweep)
    assert set(figures) == {
        *("roofline_attention", "ratio_attention", "ratio_norm"),
        "length_attention_qwen2vl_7b_float32_fwd",
    }
    bars = figures["ratio_attention"].axes[0].patches
    assert [1 + bar.get_width() for bar in bars] == [
        pytest.approx(r["x_best"]) for r in sweep["rows"][:3]
    ]
    line = figures["length_attention_qwen2vl_7b_float32_fwd"].axes[0]
    texts = [text.get_text() for text in line.get_legend().get_texts()]
    assert "vlmkernels (last slope 2.00)" in texts
    roof = figures["roofline_attention"].axes[0]
    points = [p for c in roof.collections for p in c.get_offsets().tolist() if p]
    for r in sweep["rows"][:3]:
        assert [pytest.approx(1000), pytest.approx(r["tflops"])] in points
    plt.close("all")


def test_report_is_one_file_with_everything(sweep: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(sweep, tmp_path).read_text()
    assert page.count("<svg") == 4 and page.count("<tr>") == 1 + len(sweep["rows"])
    assert "FlexAttention, attention qwen2vl_7b 512 float32 fwd: wrong" in page
    assert 'src="' not in page and "<link" not in page and "<script" not in page
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.svg"))) == 4
