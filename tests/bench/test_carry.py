"""Wheels go into one archive and come out of it whole, within a size limit."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from bench import carry


def wheel(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def small_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = [dict(f) for f in carry.FILTERS]
    filters[1]["dict_size"] = 1 << 20  # 256 MiB of it take a second to set up
    monkeypatch.setattr(carry, "FILTERS", filters)


@pytest.mark.usefixtures("small_dictionary")
def test_round_trip(tmp_path: Path) -> None:
    code = os.urandom(5000) + b"\xe8\x01\x02\x03\x04" * 1000
    wheels = [
        wheel(tmp_path, "a", {"a/__init__.py": b"x = 1\n", "a/core.so": code}),
        wheel(
            tmp_path,
            "b",
            {"b.py": b"", "b.pth": b"b_packages\nimport os\n", "b_packages/c.py": b""},
        ),
    ]
    archive = tmp_path / "dist" / "rivals.tar.xz"
    size = carry.pack(wheels, archive, limit=1 << 20)
    assert size == archive.stat().st_size < 7500
    paths = carry.unpack(archive, tmp_path / "there")
    assert (tmp_path / "there/a/core.so").read_bytes() == code
    assert paths == [tmp_path / "there", tmp_path / "there/b_packages"]


@pytest.mark.usefixtures("small_dictionary")
def test_too_large_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    big = wheel(tmp_path, "big", {"big.bin": os.urandom(1 << 20)})
    archive = tmp_path / "rivals.tar.xz"
    with pytest.raises(ValueError, match=r"1\.0 MiB of at most 0\.5; from big-1\.0.* 1\.0 MiB"):
        carry.pack([big], archive, limit=1 << 19)
    assert list(tmp_path.glob("rivals*")) == []


def test_pip_is_asked_for_wheels_of_the_other_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(carry.subprocess, "run", lambda command, check: asked.append(command))
    carry.download(["liger-kernel==0.8.5"], "3.12", tmp_path)
    (command,) = asked
    assert command[-1] == "liger-kernel==0.8.5" and "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "--only-binary=:all:" in command and "manylinux_2_28_x86_64" in command
