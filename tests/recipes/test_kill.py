"""A run that is killed with no chance to clean up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models.common import run_command, state_of
from vlmkernels.recipes.trainer import METRICS

from .common import command

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150


def lines(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def test_it_ends_as_if_nothing_had_happened(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"steps = {STEPS}\nbatch = 4\nmicro_batch = 2\nlr = 1e-3\n"
    args = command(place, tmp_path / "killed", settings, workers=1, save_every=5)
    killed = subprocess.Popen(
        [sys.executable, "-m", "vlmkernels.cli", *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    metrics = tmp_path / "killed" / METRICS
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 6):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    code, shown, err = run_command([*args, "--resume"], monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert 5 <= int(shown.split("resumed at step ")[1].split()[0]) < STEPS
    args = command(place, tmp_path / "whole", settings)
    code, _, err = run_command(args, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    weights, expected = state_of(tmp_path / "killed"), state_of(tmp_path / "whole")
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
