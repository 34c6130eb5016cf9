"""Builds and installs the package as an outsider does: build isolation, no torch, no CUDA toolkit.

Prints the time and the size of the wheel, and fails when torch is in sight of the build, when the
core links to torch, libcuda or a shared cudart, or when it cannot be imported without a driver.
Needs the network's package index; takes a few minutes. `--cpu-only` builds without CUDA.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

FORBIDDEN = ("torch", "c10", "libcuda", "libcudart")
# The core needs no torch to be loaded; only the tensors that it is given later do.
IMPORT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.build_info())
"""


def build(directory: Path, cpu_only: bool) -> tuple[Path, float]:
    """Builds a wheel in a virtual environment that holds pip alone; returns it and the seconds."""
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv/bin/python"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH")}
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", directory / "dist", "."]
    if cpu_only:
        env["VLMKERNELS_CPU_ONLY"] = "1"
    else:  # not the toolkit of this machine, if it has one
        command += ["-Ccmake.define.VLMKERNELS_PIP_NVCC=ON", "-v"]
    start = time.perf_counter()
    result = subprocess.run(
        [str(part) for part in command],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seconds = time.perf_counter() - start
    log = result.stdout
    if result.returncode:
        raise SystemExit(f"{log}\nthe build failed")
    if not cpu_only and "(PyPI)" not in log:
        raise SystemExit("the build did not take nvcc from PyPI")
    if "Collecting torch" in log:
        raise SystemExit("the build asked for torch")
    return next((directory / "dist").glob("*.whl")), seconds


def check_content(names: list[str]) -> None:
    """Everything that runs is in the wheel, and nothing else."""
    wanted = ["py.typed", "recipes/digits/checkpoint/model.safetensors", "ops/attention.py"]
    missing = [w for w in wanted if f"vlmkernels/{w}" not in names]
    bad = [n for n in names if "_C_emulated" in n or n.split("/")[0] in ("tests", "csrc", "docs")]
    if missing or bad:
        raise SystemExit(f"the wheel lacks {missing} and should not hold {bad}")


def check(directory: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        check_content(archive.namelist())
        name = next(n for n in archive.namelist() if n.startswith("vlmkernels/_C."))
        core = archive.extract(name, directory)
    linked = subprocess.run(["ldd", core], check=True, text=True, stdout=subprocess.PIPE).stdout
    bad = [line.strip() for line in linked.splitlines() if any(w in line for w in FORBIDDEN)]
    if bad:
        raise SystemExit(f"the core links to {bad}")
    subprocess.run([directory / "venv/bin/python", "-c", IMPORT, core], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu-only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wheel, seconds = build(Path(name), args.cpu_only)
        check(Path(name), wheel)
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.2f} MB, {seconds:.0f} s on {os.cpu_count()} cores")


if __name__ == "__main__":
    sys.exit(main())
