"""The two commands, from arguments to files."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmkernels.cli import main
from vlmkernels.recipes.digits import cli

from .test_photo import page


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """`run("demo", "--out", "x")` -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmkernels", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_demo(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run("demo", "--canvases", 8, "--out", tmp_path / "new")
    assert (code, err) == (0, "")
    assert "24 whole answers exact" in out
    assert "Read the digits in reading order." in out
    assert "attention" in out and "C++" in out
    assert "batches of 8: " in out  # as many as there are
    assert "ms with our ops" in out and "ms with their plain PyTorch references" in out
    picture = Image.open(tmp_path / "new" / "gallery.png").convert("RGB")
    assert picture.width > 1000
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert (0x14, 0x71, 0x3A) in colors  # at least one right answer


def test_demo_about_an_own_image(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page([[0, 1, 2]]).save(tmp_path / "mine.jpg")
    code, out, _ = run("demo", "--image", tmp_path / "mine.jpg", "--out", tmp_path)
    assert code == 0
    assert "How many digits are there?  3" in out
    assert Image.open(tmp_path / "seen.png").size == (24 * 16, 8 * 16)

    question = "Count the digits."
    code, out, _ = run(
        *("demo", "--image", tmp_path / "mine.jpg", "--question", question, "--out", tmp_path)
    )
    assert code == 0
    assert f"{question}  3" in out
    assert "largest" not in out


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_bad_image_is_one_line(run, tmp_path: Path, content: bytes) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bad.png").write_bytes(content)
    code, out, err = run("demo", "--image", tmp_path / "bad.png", "--out", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.startswith("vlmkernels: error: image ") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_without_scikit_learn_the_error_says_what_to_install(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = run("train", "digits", "--out", tmp_path / "new")
    assert code == 1
    assert "pip install 'vlmkernels[train]'" in err
    assert not (tmp_path / "new").exists()


def test_question_without_image_is_an_error(run) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run("demo", "--question", "How many digits are there?")
    assert code == 2
    assert "question: expected together with --image" in err


def test_train_killed_and_resumed_on_the_command_line(
    run,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "SAVE_EVERY", 2)
    monkeypatch.setattr(cli, "CANVASES", 8)
    from vlmkernels.recipes.digits.train import Run
    from vlmkernels.recipes.trainer import STATE

    advance = Run.advance

    def killed(self: Run) -> dict[str, float]:
        if self.step == 3:
            raise RuntimeError("killed")
        return advance(self)

    monkeypatch.setattr(Run, "advance", killed)
    assert run("train", "digits", "--out", tmp_path, "--steps", 4)[0] == 1
    monkeypatch.setattr(Run, "advance", advance)
    code, _, err = run("train", "digits", "--out", tmp_path, "--steps", 4)
    assert code == 2 and "or --resume" in err
    code, out, err = run("train", "digits", "--out", tmp_path, "--steps", 4, "--resume")
    assert code == 0, err
    assert "resumed at step 2" in out
    assert "whole answers exact" in out
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000_000
    assert not (tmp_path / STATE).exists()
