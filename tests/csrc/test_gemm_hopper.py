"""csrc/common's Hopper main loop: a small program over it, compiled here, run emulated."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import need_emulated_core
from vlmkernels import _core

ROOT = Path(__file__).resolve().parents[2]
NVCC_DIRS = [
    os.environ["PATH"],
    *map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")),
    "/usr/local/cuda/bin",
]
FLAGS = [
    *("-std=c++20", "-O2", "-DNDEBUG", "--expt-relaxed-constexpr", "-cudart", "none"),
    *("-gencode", "arch=compute_90a,code=compute_90a"),
    *("-include", str(ROOT / "cmake/separate_fatbins.h"), "-I", str(ROOT / "csrc")),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_emulated_core()
    nvcc = shutil.which("nvcc", path=os.pathsep.join(NVCC_DIRS))
    assert nvcc, "pip install nvidia-cuda-nvcc"
    module = _core._load_emulated().__file__
    libraries = subprocess.run(["ldd", module], check=True, text=True, capture_output=True).stdout
    runtime = Path(re.findall(r"=> (\S+/libcudart\.so\S*)", libraries)[0])
    out = tmp_path_factory.mktemp("gemm_hopper") / "program"
    sources = ["tests/csrc/gemm_hopper.cu", "csrc/common/tensor_map.cu", "csrc/common/launch.cu"]
    subprocess.run(
        [nvcc, *FLAGS, *sources, "-o", out, "-Xlinker", f"{runtime},-rpath={runtime.parent}"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("seed", range(3))
def test_exact(program: Path, seed: int) -> None:
    """Every way to store and to fetch an operand; small integers have no rounding."""
    environment = {**os.environ, "PTXEMU_SEED": str(seed), "PTXEMU_SLICE": str(400 - 150 * seed)}
    run = subprocess.run([program], text=True, capture_output=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("error 0, 0 wrong") == 8


def test_other_architecture(program: Path) -> None:
    """VLMKERNELS_ARCH=80: has_hopper() says no."""
    environment = {**os.environ, "VLMKERNELS_ARCH": "80"}
    run = subprocess.run([program], text=True, capture_output=True, env=environment)
    assert run.returncode == 1 and run.stdout == "no sm_90a\n"
