"""Packs rivals' wheels for a GPU machine without a network: `python -m bench.carry`.

Downloads wheels with pip, unpacks them into one tree and compresses that far better than wheels do
(x86 branch filter, large dictionary). There, tools/gpu.sh unpacks dist/rivals.tar.xz and puts it
on the path; `--unpack DIR` does the same by hand.
"""

import argparse
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# Pure Python, or with CUDA code that needs nothing but torch. What needs more is given by name.
DEFAULT = (
    *("fa3-fwd", "liger-kernel", "flash-kmeans", "inf-cl", "open-clip-torch", "ftfy"),
    *("vector-quantize-pytorch", "einx", "loguru", "torch-einops-utils", "einops", "frozendict"),
)
FILTERS = (
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20},
)


def download(packages: Sequence[str], python: str, directory: Path) -> list[Path]:
    """The wheels of these packages alone for Linux on x86-64; what they need must be there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--dest", str(directory), "--quiet"]
    for platform in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "linux_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *packages], check=True)
    return sorted(directory.glob("*.whl"))


def pack(wheels: Sequence[Path], archive: Path, limit: int) -> int:
    """Writes the contents of all wheels as one .tar.xz; returns its bytes.

    Raises ValueError, and leaves no file, when it is larger than `limit` bytes.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tempfile.TemporaryDirectory() as name:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as contents:
                contents.extractall(name)
        with (
            lzma.open(partial, "wb", filters=list(FILTERS)) as stream,
            tarfile.open(fileobj=stream, mode="w") as tar,
        ):
            for path in sorted(Path(name).iterdir()):
                tar.add(path, arcname=path.name)
    size = partial.stat().st_size
    if size > limit:
        partial.unlink()
        sizes = ", ".join(f"{w.name} {w.stat().st_size / 2**20:.1f} MiB" for w in wheels)
        raise ValueError(f"{size / 2**20:.1f} MiB of at most {limit / 2**20:.1f}; from {sizes}")
    partial.replace(archive)
    return size


def unpack(archive: Path, directory: Path) -> list[Path]:
    """Unpacks an archive; returns what PYTHONPATH needs: the folder and what .pth files name."""
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream) as tar:
        tar.extractall(directory, filter="data")
    paths = [directory]
    for pth in sorted(directory.glob("*.pth")):
        for line in pth.read_text().splitlines():
            if line.strip() and not line.startswith(("#", "import")):
                paths.append(directory / line.strip())
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--archive", type=Path, default=Path("dist/rivals.tar.xz"))
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    parser.add_argument("--limit", type=float, default=48, help="MiB that the archive may have")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="print the path to it as well")
    args = parser.parse_args()
    if args.unpack:
        print(":".join(str(path) for path in unpack(args.archive, args.unpack)))
        return
    with tempfile.TemporaryDirectory() as name:
        wheels = download(args.packages or DEFAULT, args.python, Path(name))
        for wheel in wheels:
            print(f"{wheel.stat().st_size / 2**20:7.1f} MiB  {wheel.name}")
        size = pack(wheels, args.archive, int(args.limit * 2**20))
    print(f"{size / 2**20:7.1f} MiB  {args.archive}")


if __name__ == "__main__":
    main()
