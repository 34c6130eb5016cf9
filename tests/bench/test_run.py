"""The command: what it measures, writes, keeps when stopped, and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import record, run
from bench.case import Case
from vlmkernels import cli


def small_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Stands for a file of bench/ops; the last case is where a user gets impatient."""
    x = torch.ones(64, dtype=dtype)
    for shape in ("vit_b_16_224 64", "qwen2vl_7b 64"):
        for direction in ("fwd", "bwd"):
            variants = {"vlmkernels": x.clone, "eager": x.clone}
            name = str(dtype).removeprefix("torch.")
            yield Case("op", shape, name, direction, bytes=512, flops=0, variants=variants)


def stopped_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    cases = small_cases(device, dtype)
    yield next(cases)
    raise KeyboardInterrupt


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(
        run, "_modules", lambda names: [SimpleNamespace(__name__="", cases=small_cases)]
    )
    monkeypatch.setattr(run, "ceilings", lambda *_: {"copy_gbps": 10.0, "gemm_tflops": 0.1})
    return monkeypatch


def bench(*args: str) -> None:
    run.main(["--device", "cpu", "--rounds", "1", "--rivals", "none", *args])


FIELDS = {
    *("op", "shape", "dtype", "direction", "us", "tflops", "gbps", "pct_ceiling", "peak_mb"),
    *("error", "x_eager", "x_best", "best"),
}


def test_json_holds_the_run(
    quick: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--json", str(tmp_path / "new" / "run.json"))
    saved = json.loads((tmp_path / "new" / "run.json").read_text())
    assert {"machine", "versions", "commit", "date", "rows"} <= set(saved)
    assert saved["complete"] and saved["threads"] == torch.get_num_threads()
    assert saved["versions"]["torch"] == torch.__version__
    assert len(saved["rows"]) == 4
    assert all(set(row) >= FIELDS for row in saved["rows"])
    out = capsys.readouterr().out
    assert f"{saved['threads']} threads" in out and "qwen2vl_7b 64" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shapes", "qwen2vl_7b"], [("qwen2vl_7b 64", "fwd"), ("qwen2vl_7b 64", "bwd")]),
        (["--mode", "bwd"], [("vit_b_16_224 64", "bwd"), ("qwen2vl_7b 64", "bwd")]),
        (["--mode", "fwd", "--shapes", "vit_b_16_224"], [("vit_b_16_224 64", "fwd")]),
    ],
)
def test_options_choose_cases(
    quick: pytest.MonkeyPatch, tmp_path: Path, options: list[str], expected: list[tuple[str, str]]
) -> None:
    bench("--json", str(tmp_path / "run.json"), *options)
    rows = record.load(tmp_path / "run.json")["rows"]
    assert [(row["shape"], row["direction"]) for row in rows] == expected


def test_a_shape_of_each_op_in_bfloat16(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = SimpleNamespace(__name__="bench.ops.norm", cases=small_cases)
    quick.setattr(run, "_modules", lambda names: [module])
    bench("--json", str(tmp_path / "run.json"))
    rows = record.load(tmp_path / "run.json")["rows"]
    assert [r["shape"] for r in rows if r["dtype"] == "bfloat16"] == ["vit_b_16_224 64"] * 2
    bench("--json", str(tmp_path / "run.json"), "--dtype", "float32")
    rows = record.load(tmp_path / "run.json")["rows"]
    assert {row["dtype"] for row in rows} == {"float32"}


def test_ctrl_c_keeps_what_was_measured(
    quick: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.setattr(
        run, "_modules", lambda names: [SimpleNamespace(__name__="", cases=stopped_cases)]
    )
    bench("--json", str(tmp_path / "run.json"))
    saved = record.load(tmp_path / "run.json")
    assert len(saved["rows"]) == 1 and not saved["complete"]
    assert "keeping the 1 rows" in capsys.readouterr().out


def test_a_failed_row_is_exit_code_1(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
        x = torch.ones(64)
        variants: dict[str, Any] = {"vlmkernels": lambda: -x, "eager": x.clone}
        yield Case("op", "s 64", "float32", "fwd", bytes=512, flops=0, variants=variants)

    quick.setattr(run, "_modules", lambda names: [SimpleNamespace(__name__="", cases=wrong_cases)])
    with pytest.raises(SystemExit) as stop:
        bench()
    assert stop.value.code == 1
    assert "FAILED op | s 64 | float32 | fwd: wrong: error 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "unknown op nothing; there are activation"),
        (["--shapes", "gpt_9"], "unknown shape gpt_9"),
        (["--dtype", "float33"], "unknown dtype"),
        (["--mode", "sideways"], "invalid choice"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--threads", "-1"], "--threads: expected at least 0, got -1"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_file_to_compare_with_is_known_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_all", lambda *_: pytest.fail("measured before"))
    with pytest.raises(ValueError, match=r"none.json: expected the JSON of a bench run"):
        run.main(["null", "--device", "cpu", "--check", str(tmp_path / "none.json")])


def test_unknown_rival_is_named() -> None:
    with pytest.raises(ValueError, match=r"--rivals: expected some of .*SDPA flash.*got nobody"):
        run.main(["null", "--device", "cpu", "--rivals", "nobody"])


def test_vlmkernels_bench_passes_everything_on(
    quick: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    options = ["--device", "cpu", "--rounds", "1", "--rivals", "none", "--json", str(path)]
    quick.setattr(sys, "argv", ["vlmkernels", "bench", "null", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert len(record.load(path)["rows"]) == 4


def test_bench_from_a_wheel(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel carries bench/ inside of the package; without it the command says so."""
    package = tmp_path / "vlmkernels"
    (package / "_bench" / "bench").mkdir(parents=True)
    quick.setattr(cli, "__file__", str(package / "cli.py"))
    quick.setattr(sys, "argv", ["vlmkernels", "bench", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    (package / "_bench" / "bench" / "run.py").touch()
    quick.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert sys.path[0] == str(package / "_bench")


def test_record_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    for name in ("list.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name}: expected the JSON of a bench run"):
            record.load(tmp_path / name)


def test_every_room_has_cases_that_agree_with_eager(tmp_path: Path) -> None:
    """A case of each file and direction, unmeasured: known names, stated work, equal results."""
    from bench.case import tensors
    from bench.measure import relative_error

    for module in run._modules([]):
        if module.__name__.startswith("bench.models"):
            continue
        first = {case.direction: case for case in reversed([*module.cases("cpu", torch.float32)])}
        for case in first.values():
            ours, eager = (tensors(case.variants[name]()) for name in ("vlmkernels", "eager"))
            assert relative_error(ours, eager) < 1e-4, case
            assert case.bytes > 0
            assert case.op == "null" or case.shape.split()[0] in run.NAMED
