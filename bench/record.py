"""A run as it is written to disk: the machine, the versions, the commit, the date, the rows."""

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Run = dict[str, Any]
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    "vlmkernels",
    "torch",
    "transformers",
    "triton",
    "liger-kernel",
    "flash-attn",
    "fa3-fwd",
)


def new_run(device: str) -> Run:
    """An empty run of this machine, today."""
    cuda = device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name() if cuda else cpu_name(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # what else ran: threads that wait for each other suffer most
        "versions": versions(cuda),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "complete": False,
        "ceilings": {},
        "rows": [],
    }


def cpu_name() -> str:
    """The CPU as it names itself, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        name = found[1] if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name.replace('(R)', '').replace('(TM)', '').strip()}, {cores} cores"


def versions(cuda: bool) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if cuda:
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str:
    """The commit of the source tree, with "+" if a tracked file differs; "" outside of a clone."""
    if not (ROOT / "pyproject.toml").exists():  # installed from a wheel, perhaps inside of a clone
        return ""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _git(*args: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    result.check_returncode()
    return result.stdout.strip()


def slug(machine: str) -> str:
    """The machine's folder in bench/results."""
    return re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")


def key(row: Row) -> str:
    """What makes a row of one run comparable to one of another."""
    return " | ".join(str(row[part]) for part in ("op", "shape", "dtype", "direction"))


def save(run: Run, path: Path) -> None:
    """Writes the run; a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_rounded(run), indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> Run:
    """Raises ValueError when the file holds no run."""
    try:
        run = json.loads(path.read_text())
        run["rows"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the JSON of a bench run, {error!r}") from error
    return run  # type: ignore[no-any-return]


def committed() -> list[tuple[str, Run]]:
    """(folder/file without suffix, run) of all runs in bench/results, ordered by name."""
    paths = sorted(RESULTS.glob("*/*.json"))
    return [(f"{path.parent.name}/{path.stem}", load(path)) for path in paths]


def _rounded(value: Any) -> Any:
    """Floats to five digits: what is measured has no more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
