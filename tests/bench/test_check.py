"""Regressions: found when beyond spread and slack, not before."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import check
from bench import run as command
from bench.record import RESULTS, ROOT, load
from tests.bench.runs import row, run


@pytest.mark.parametrize(
    ("us", "slower"), [(100.0, False), (119.0, False), (135.0, True), (60.0, False)]
)
def test_cpu_ratios_may_fall_by_a_fifth(us: float, slower: bool) -> None:
    found = check.regressions(run(row(us=us)), run(row(us=100.0)))
    assert bool(found) == slower
    if slower:
        assert found == [
            "attention | qwen2vl_7b 512 | float32 | fwd: 1.48 x eager, floor 2.00 less 20%"
        ]


@pytest.mark.parametrize(("us", "slower"), [(102.0, False), (106.0, True), (90.0, False)])
def test_gpu_times_beyond_the_spread(us: float, slower: bool) -> None:
    new, old = run(row(us=us), device="cuda"), run(row(us=100.0), device="cuda")
    assert bool(check.regressions(new, old)) == slower


def test_wide_spread_is_no_regression() -> None:
    noisy = row(us=150.0, us_low=90.0)
    assert check.regressions(run(noisy), run(row())) == []


def test_a_row_that_fails_now_is_a_regression() -> None:
    failed = {k: v for k, v in row().items() if k not in ("us", "x_eager")}
    found = check.regressions(run({**failed, "failed": "wrong: error 1"}), run(row()))
    assert len(found) == 1 and "failed: wrong" in found[0]


def test_only_common_rows_are_compared_and_counted() -> None:
    new, old = run(row(), row(shape="new 1")), run(row(), row(shape="old 1"))
    assert check.regressions(new, old) == []
    assert check.summary(new, old, []).startswith("compared 1 rows of 2")


def test_nothing_in_common_is_a_failure() -> None:
    found = check.regressions(run(row(shape="new 1")), run(row(shape="old 1")))
    assert found == ["nothing to compare: the runs have no row in common"]


def test_check_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, us in (("old", 100.0), ("new", 135.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run(row(us=us))))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    command.main(["--from", new, "--check", new])
    assert "nothing became slower" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command.main(["--from", new, "--check", old])
    assert stop.value.code == 1
    assert "SLOWER attention | qwen2vl_7b 512" in capsys.readouterr().out


def test_floor_keeps_the_ratios() -> None:
    floor = check.floor_of(run(row()))
    assert floor["rows"] == [
        {**{part: row()[part] for part in ("op", "shape", "dtype", "direction")}, "x_eager": 2.0}
    ]
    assert check.regressions(run(row(us=300.0)), floor) != []
    assert SimpleNamespace(**floor).device == "cpu"


def test_the_committed_floor_is_of_rows_that_are_measured() -> None:
    floor = load(ROOT / "bench" / "floor.json")
    assert floor["rows"]
    measured = {check.key(r) for p in RESULTS.glob("*/cpu.json") for r in load(p)["rows"]}
    assert {check.key(r) for r in floor["rows"]} <= measured
