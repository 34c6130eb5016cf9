"""What this installation is and does: `python -m vlmkernels.info` or `vlmkernels info`."""

import platform
from typing import NamedTuple

import torch

import vlmkernels
import vlmkernels.distributed.contrastive_loss
import vlmkernels.ops  # define the ops that are listed here
from vlmkernels import _core
from vlmkernels.ops import _library


class Backend(NamedTuple):
    """What runs an op, and why."""

    name: str
    why: str


def backends(device: torch.device | str | None = None) -> dict[str, Backend]:
    """For every op the backend that it takes on `device` (default: the GPU, if there is one).

    Returns:
        op name -> (backend, reason).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {name: _backend(op, device) for name, op in sorted(_library.ops.items())}


def _backend(op: _library.Op, device: torch.device) -> Backend:
    build = _core.C.build_info()
    if _library.references_only():
        return Backend("PyTorch reference", "inside testing.reference_ops()")
    if build["emulated"]:
        return Backend("CUDA, emulated", "VLMKERNELS_EMULATE=1 or testing.emulate()")
    if device.type == "cuda":
        if not build["cuda"]:
            return Backend("PyTorch reference", "built with VLMKERNELS_CPU_ONLY=1")
        if not _core.C.takes_cuda(torch.empty(0, device=device)):
            return Backend("PyTorch reference", f"no code for this GPU, only {build['cuda_archs']}")
        return Backend("CUDA", f"built for {build['cuda_archs']}")
    if op.cpu == "C++":
        return Backend(f"C++ {build['cpu']}", "best instruction set of this CPU")
    return Backend("PyTorch", op.cpu)


def report(verbose: bool = False) -> str:
    """Version, build, torch, GPUs, and the backend of every op, as text; verbose: kernel tiles."""
    build = _core.C.build_info()
    version = f"{build['cuda'] // 100}.{build['cuda'] % 100 // 10}"
    cuda = f"{version}, for {build['cuda_archs']}" if build["cuda"] else "none (CPU only)"
    lines = [
        f"vlmkernels {vlmkernels.__version__}",
        f"built with {build['compilers']}",
        f"CUDA code  {cuda}",
        f"CPU code   {build['cpu']}, {torch.get_num_threads()} threads",
        f"torch      {torch.__version__}, Python {platform.python_version()}",
        f"GPUs       {', '.join(_gpus()) or 'none that torch can use'}",
        "",
    ]
    rows = [(name, *backend) for name, backend in backends().items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines += [f"{op:{widths[0]}}  {name:{widths[1]}}  {why}" for op, name, why in rows]
    return "\n".join(lines + (_tiles() if verbose else []))


def _tiles() -> list[str]:
    """The tiles of the Hopper attention kernels; a head_dim takes the next number of columns."""
    rows = _core.C.attention_tiles()
    cells = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return ["", "attention on sm_90a: tiles", *(line.rstrip() for line in lines)]


def _gpus() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return found


if __name__ == "__main__":
    print(report())
