"""What an installation puts on sys.path and carries, built by the backend itself, without CMake."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlmkernels import _core

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from scikit_build_core import build
hook, folder, scratch = sys.argv[1:]
print(getattr(build, hook)(folder, {"wheel.cmake": "false", "build-dir": scratch}))
"""
# -S: an installation of this package in the running environment must not answer instead.
INSTALLED = """
import importlib.util, json, site, sys
folder, core, *others = sys.argv[1:]
here = len(sys.path)
site.addsitedir(folder)
print(json.dumps(sys.path[here:]))
sys.path += others
spec = importlib.util.spec_from_file_location("vlmkernels._C", core)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.argv = ["vlmkernels", "bench", "--help"]
from vlmkernels.cli import main
main()
"""


def install(hook: str, folder: Path) -> tuple[list[str], str]:
    """What the installation adds to the sys.path of a new process, and `bench --help` there."""
    site, scratch = folder / "site", folder / "scratch"
    command = [sys.executable, "-c", BUILD, hook, str(folder), str(scratch)]
    built = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    with zipfile.ZipFile(folder / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(site)
    others = [p for p in sys.path if p and Path(p) != ROOT]  # torch and the rest
    command = [sys.executable, "-I", "-S", "-c", INSTALLED, str(site), _core.C.__file__, *others]
    ran = subprocess.run(command, cwd=folder, check=True, text=True, capture_output=True)
    paths, _, text = ran.stdout.partition("\n")
    return [p for p in json.loads(paths) if p != str(site)], text


@pytest.mark.parametrize("hook", ["build_editable", "build_wheel"])
def test_an_installation_brings_only_its_own_folders(hook: str, tmp_path: Path) -> None:
    """Editable: the checkout; a folder above it would shadow packages with what lies there."""
    paths, text = install(hook, tmp_path)
    assert paths == ([str(ROOT)] if hook == "build_editable" else [])
    assert "--rivals" in text
