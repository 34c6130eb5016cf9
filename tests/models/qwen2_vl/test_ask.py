"""`vlmkernels ask`: an answer on stdout, or one readable line on stderr and an exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.models.common import run_command
from tests.models.qwen2_vl import cases
from vlmkernels.models import load, load_processor


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    Image.fromarray(cases.picture(60, 80)).save(tmp_path / "a.png")
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(cases.video(4, 28, 28)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "bad.png").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("num_beams", [1, 3])
def test_ask_prints_the_models_answer(
    num_beams: int,
    checkpoint_dir: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, frames = pictures / "a.png", pictures / "frames"
    args = ["ask", "--model", str(checkpoint_dir), "--image", str(image), "--image", str(image)]
    args += ["--video", str(frames), "--max-new-tokens", "6", "--device", "cpu", "What is it?"]
    args += ["--num-beams", str(num_beams)] if num_beams > 1 else []
    code, out, err = run_command(args, monkeypatch, capsys)

    processor = load_processor(checkpoint_dir)
    content = [{"type": "image", "image": image}] * 2 + [{"type": "video", "video": frames}]
    content += [{"type": "text", "text": "What is it?"}]
    inputs = processor.from_messages([{"role": "user", "content": content}])
    ids = load(checkpoint_dir).generate(**inputs, max_new_tokens=6, num_beams=num_beams)
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    expected = processor.tokenizer.decode(answer).rstrip("\ufffd")
    assert (code, out, err) == (0, expected + "\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "model: expected a checkpoint directory, found none at nowhere"),
        (["--model", "MODEL", "--image", "bad.png"], "bad.png: expected a readable image"),
        (["--model", "MODEL", "--video", "bad.png"], "expected a directory of frames"),
        (["--model", "MODEL", "--dtype", "bf61"], "dtype: expected a floating-point one such as"),
        (["--model", "MODEL", "--dtype", "int8"], "such as bfloat16, got 'int8'"),
        (["--model", "MODEL", "--dtype", "float8_e4m3fn"], "dtype: expected one of"),
        (["--model", "MODEL", "--device", "foo"], "device: expected cpu, cuda or cuda:N, got"),
        (["--model", "MODEL", "--device", "meta"], "device: expected cpu, cuda or cuda:N, got"),
        (["--model", "MODEL", "--device", "cuda:-1"], "device: expected cpu, cuda or cuda:N, got"),
        (["--model", "MODEL", "--device", "cuda:256"], "device: expected one that is there"),
        (["--model", "MODEL", "--top-p", "0.9"], "top_p: expected together with temperature > 0"),
        (["--model", "MODEL", "--seed", "3"], "seed: expected together with temperature > 0"),
        (["--model", "MODEL", "--num-beams", "0"], "num_beams: expected a positive integer, got 0"),
        (
            ["--model", "MODEL", "--num-beams", "2", "--temperature", "1"],
            "temperature: expected none with num_beams > 1, got one",
        ),
        (["--model", "MODEL", "--device", "cuda:99"], "device: expected one that is there"),
        (["--model", "MODEL", "--max-new-tokens", "0"], "max_new_tokens: expected at least 1"),
        (["--model", "MODEL", "--seed", "x"], "Invalid value for '--seed'"),
        ([], "Missing option '--model'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_exit_code_2(
    options: list[str],
    message: str,
    checkpoint_dir: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pictures)
    options = [str(checkpoint_dir) if option == "MODEL" else option for option in options]
    code, out, err = run_command(["ask", *options, "What is it?"], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_failing_run_is_exit_code_1(
    checkpoint_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate much")

    monkeypatch.setattr("vlmkernels.models.load", out_of_memory)
    code, _, err = run_command(
        ["ask", "--model", str(checkpoint_dir), "What?"], monkeypatch, capsys
    )
    assert code == 1
    assert err == "vlmkernels: error: CUDA out of memory. Tried to allocate much\n"


def test_a_missing_package_is_one_line_and_exit_code_1(
    checkpoint_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vlmkernels.models.generation", None)
    code, out, err = run_command(
        ["ask", "--model", str(checkpoint_dir), "What?"], monkeypatch, capsys
    )
    assert (code, out) == (1, "")
    assert err.startswith("vlmkernels: error: import of vlmkernels.models.generation halted")
    assert err.count("\n") == 1


def test_the_command_starts_without_heavy_imports() -> None:
    code = "import sys, vlmkernels.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
