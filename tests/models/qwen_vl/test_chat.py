"""Conversations: `Chat`, `vlmkernels ask` and `vlmkernels chat`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models.common import picture, run_command
from vlmkernels.models import load, load_processor
from vlmkernels.models.chat import Chat
from vlmkernels.models.generation import stream_text
from vlmkernels.models.qwen_vl import draw


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with two pictures."""
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(picture(30, 50, seed=i)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_question_comes_with_what_was_said(chat_dir: Path) -> None:
    talk = Chat(load(chat_dir), load_processor(chat_dir), "Be short.")
    cat, dog = picture(9, 9), picture(8, 8, seed=1)
    assert talk.last_image() is None
    first = talk.ask("What is it?", [cat], max_new_tokens=5)
    second = talk.ask("And now?", [dog], max_new_tokens=5)
    assert talk.last_image() is dog
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
    assert [m["content"][-1]["text"] for m in talk.messages[2::2]] == [first, second]
    inputs = talk.processor.from_messages(talk.messages[:4])
    steps = talk.model.generate_steps(**inputs, max_new_tokens=5)
    assert "".join(stream_text(talk.processor.tokenizer, steps)) == second
    assert inputs["pixel_values"].shape[0] == 2


def test_what_failed_or_was_broken_off_was_not_said(chat_dir: Path) -> None:
    talk = Chat(load(chat_dir), load_processor(chat_dir))
    next(talk.stream("What is it?", max_new_tokens=5))
    with pytest.raises(ValueError, match="expected an image file, found none"):
        talk.ask("What is it?", ["none.png"])
    assert talk.messages == []


def test_ask(
    chat_dir: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["ask", "--model", str(chat_dir), "--image", "a.png", "--max-new-tokens", "9"]
    code, out, err = run_command([*args, "--device", "cpu", "What is it?"], monkeypatch, capsys)
    talk = Chat(load(chat_dir), load_processor(chat_dir))
    answer = talk.ask("What is it?", [Path("a.png")], max_new_tokens=9)
    assert (code, out, err) == (0, answer + "\n", "")


def test_chat(
    chat_dir: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk = Chat(load(chat_dir), load_processor(chat_dir), "Be short.")
    answers = [
        talk.ask("What is it?", [Path("a.png")], max_new_tokens=5),
        talk.ask("And this?", [Path("b.png")], max_new_tokens=5),
    ]
    lines = "What is it?\n/image b.png\nAnd this?\n/draw out.png\n\nnot read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    args = ["chat", "--model", str(chat_dir), "--image", "a.png", "--system", "Be short."]
    args += ["--max-new-tokens", "5", "--device", "cpu"]
    code, out, err = run_command(args, monkeypatch, capsys)
    assert (code, out, err) == (0, "".join(answer + "\n" for answer in answers), "")
    assert (np.asarray(Image.open("out.png")) == np.asarray(draw("b.png", answers[1]))).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/draw out.png\n", "/draw: expected an answer about an image before, found none"),
        ("/image none.png\nWhat?\n", "none.png: expected an image file, found none"),
    ],
)
def test_chat_says_what_is_wrong(
    lines: str,
    message: str,
    chat_dir: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    args = ["chat", "--model", str(chat_dir), "--device", "cpu"]
    code, _, err = run_command(args, monkeypatch, capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_chat_looks_at_its_options_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["chat", "--model", str(tmp_path / "none"), "--device", "cpu", "--top-p", "0.5"]
    code, _, err = run_command(args, monkeypatch, capsys)
    assert code == 2 and "top_p: expected together with temperature > 0" in err


def test_a_slip_of_the_keyboard_ends_nothing(
    chat_dir: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keyboard = io.StringIO("/image none.png\nWhat?\n/draw out.png\nWhat?\n")
    monkeypatch.setattr(keyboard, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", keyboard)
    args = ["chat", "--model", str(chat_dir), "--device", "cpu", "--max-new-tokens", "5"]
    code, out, err = run_command(args, monkeypatch, capsys)
    answer = Chat(load(chat_dir), load_processor(chat_dir)).ask("What?", max_new_tokens=5)
    assert (code, out) == (0, answer + "\n")
    assert "none.png" in err and "/draw: expected an answer about an image" in err
