"""What the CUDA kernels cost, counted with no GPU: `python -m bench.counted [op ...]`.

Registers, shared memory and stack come from the compiler (cuobjdump), instructions, FLOPs and bytes
from executing every kernel on the emulated CUDA runtime. The floor is the time that the busiest
unit of the named GPU needs for these counts when all its SMs work without a pause. All of it is
counted, nothing measured.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.case import forward, gradient
from bench.record import ROOT, commit
from vlmkernels import _core, ops

MARK, SETUP = "vlmkernels counted:", "(setup)"
RESULT = ROOT / "bench" / "results" / "counted.json"


@dataclass(frozen=True)
class Gpu:
    """Rates per SM and clock. Sources: NVIDIA H100 whitepaper, CUDA programming guide."""

    name: str = "H100 SXM"
    sms: int = 132
    clock_ghz: float = 1.83
    wgmma_flops: int = 4096  # dense fp16, bf16
    mma_flops: int = 2540  # mma.sync reaches 62 % of wgmma
    ex2: int = 16
    issues: int = 4  # warp instructions
    l1_bytes: int = 128
    l2_bytes: float = 5120 / 132
    shared_wavefronts: int = 1
    registers: int = 65536
    shared_bytes: int = 233472
    warps: int = 64
    blocks: int = 32


@dataclass
class Launch:
    """Counts of one or several launches of the same kernel by one call."""

    call: str
    kernel: str
    grid: str
    threads: int
    static_smem: int
    dynamic_smem: int
    instructions: int
    launches: int = 1
    wgmma_gflop: float = 0.0
    mma_gflop: float = 0.0
    ex2: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    wavefronts: int = 0
    registers: int = 0
    stack: int = 0
    occupancy: float = 0.0
    floor_us: float = 0.0
    bound: str = ""


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Small calls that reach every CUDA kernel: name -> what prepares the function to count."""
    torch.manual_seed(0)

    def rand(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(shape).bfloat16().requires_grad_(grad)

    found: dict[str, Callable[[], Callable[[], Any]]] = {}

    def add(name: str, function: Callable[..., Any], **inputs: Any) -> None:
        found[f"{name} fwd"] = partial(forward, function, inputs)
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.values()):
            found[f"{name} bwd"] = partial(gradient, function, inputs)

    add("null 1 MiB", ops.null, x=rand(1 << 19, grad=False))
    for dim, causal in ((128, True), (80, False)):
        qkv = {name: rand(1, 512, 2, dim) for name in "qkv"}
        kind = "causal" if causal else "full"
        add(f"attention 1x512x2x{dim} {kind}", ops.attention, **qkv, causal=causal)
    qkv = {name: rand(1, 512, 2, 128) for name in "qkv"}
    ids = (torch.arange(512, dtype=torch.int32) // 128)[None]
    add(
        "attention 1x512x2x128 causal, 4 documents",
        ops.attention,
        **qkv,
        causal=True,
        segment_ids=ids,
    )
    add("attention 1x512x2x128 bias", ops.attention, **qkv, bias=rand(1, 2, 512, 512))
    cache = {name: rand(1, 1024, 1, 128, grad=False) for name in ("k_cache", "v_cache")}
    seqlens = torch.tensor([1000], dtype=torch.int32)
    q = rand(1, 1, 4, 128, grad=False)
    add(
        "attention_decode 1x1000x4+1x128", ops.attention_decode, q=q, **cache, cache_seqlens=seqlens
    )
    positions = torch.arange(256).repeat(3, 1)
    text = {"q": rand(256, 8, 128), "k": rand(256, 2, 128)}
    add("mrope 256x8+2x128", ops.mrope, **text, position_ids=positions, sections=(16, 24, 24))
    normed = {**text, "q_weight": rand(128), "k_weight": rand(128), "interleaved": True}
    sections = {"position_ids": positions, "sections": (24, 20, 20)}
    add("qk_norm_rope 256x8+2x128", ops.qk_norm_rope, **normed, **sections)
    packed = {"qkv": rand(256, 3, 4, 80), "position_ids": positions[:2]}
    add("vision_rope_qkv 256x3x4x80", ops.vision_rope_qkv, **packed)
    add("gelu 256x5120", ops.gelu, x=rand(256, 5120))
    add("swiglu 256x3420", ops.swiglu, gate=rand(256, 3420), up=rand(256, 3420))
    add("rms_norm 256x3584", ops.rms_norm, x=rand(256, 3584), weight=rand(3584))
    layer = {"x": rand(256, 1280), "weight": rand(1280), "bias": rand(1280)}
    add("layer_norm 256x1280", ops.layer_norm, **layer)
    features = {"image_features": rand(256, 512), "text_features": rand(256, 512)}
    scalars = {"logit_scale": torch.tensor(0.1, requires_grad=True)}
    add("clip_loss 256x512", ops.clip_loss, **features, **scalars)
    scalars["logit_bias"] = torch.tensor(-5.0, requires_grad=True)
    add("siglip_loss 256x512", ops.siglip_loss, **features, **scalars)
    add("patch_embed 128x1176 to 256", ops.patch_embed, x=rand(128, 1176), weight=rand(256, 1176))
    qformer = {"weight_k": rand(128, 512), "weight_v": rand(128, 512)}
    add(
        "qformer_attention 1x32x257x512", ops.qformer_attention, q=rand(1, 32, 2, 64),
        x=rand(1, 257, 512), **qformer,
    )  # fmt: skip
    codes = {"z": rand(256, 64, grad=False), "codebook": rand(1024, 64, grad=False)}
    add("vq_lookup 256x1024x64", ops.vq_lookup, **codes)
    images = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    how: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "merge_size": 2}
    frames = rand(256, 3, 2, 14, 14)
    add("patch_embed_pixels 64x588", ops.patch_embed_pixels, images=images, weight=frames, **how)
    return found


def emit(chosen: list[str]) -> None:
    """Runs the calls; the emulator writes its statistics to stderr, we the marks between them."""
    for name, prepare in calls().items():
        if not chosen or name.startswith(tuple(chosen)):
            print(MARK, SETUP, file=sys.stderr, flush=True)
            run = prepare()
            print(MARK, name, file=sys.stderr, flush=True)
            run()


def count(chosen: list[str], gpu: Gpu | None = None) -> list[Launch]:
    """Runs the chosen calls (all, if none) on the emulated runtime, in a process of its own."""
    environment = os.environ | {
        "VLMKERNELS_EMULATE": "1",
        "PTXEMU_STATS": "1",
        "PTXEMU_CHECK": "none",
        "PTXEMU_THREADS": "1",
    }
    command = [sys.executable, "-m", "bench.counted", "--emit", *chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"the emulated run failed:\n{result.stderr[-2000:]}")
    launches, usage = _merged(parse(result.stderr)), resources(Path(_core.C.__file__))
    for launch in launches:
        launch.registers, launch.stack = _usage_of(launch.kernel, usage)
        launch.occupancy = occupancy(launch, gpu or Gpu())
        launch.floor_us, launch.bound = floor(launch, gpu or Gpu())
        launch.kernel = short_name(launch.kernel)
    return launches


LAUNCH = re.compile(
    r"ptxemu: kernel (?P<kernel>.+) grid \((?P<grid>[\d,]+)\) cluster \([\d,]+\) "
    r"block \((?P<block>[\d,]+)\) smem (?P<static>\d+)\+(?P<dynamic>\d+): .* s, "
    r"(?P<instructions>\d+) warp instructions"
)
FLOPS = re.compile(r"wgmma ([\d.]+) GFLOP .*?, mma ([\d.]+) GFLOP .*?, ex2 (\d+) thread ops")
GLOBAL = re.compile(
    r"global: ld (\d+) B .*, st (\d+) B .*; TMA ld (\d+) B, st (\d+) B; cp.async (\d+) B"
)
SHARED = re.compile(r"shared: .* (\d+) wavefront requests, (\d+) bank conflicts")


def parse(text: str) -> Iterator[Launch]:
    """The launches in the emulator's statistics, under the call whose mark stands before them."""
    call, launch = "", None
    for line in text.splitlines():
        if line.startswith(MARK):
            call = line.removeprefix(MARK).strip()
        elif found := LAUNCH.search(line):
            x, y, z = (int(n) for n in found["block"].split(","))
            launch = Launch(
                call=call,
                kernel=found["kernel"],
                grid=found["grid"].replace(",", "x"),
                threads=x * y * z,
                static_smem=int(found["static"]),
                dynamic_smem=int(found["dynamic"]),
                instructions=int(found["instructions"]),
            )
        elif launch and (found := FLOPS.search(line)):
            launch.wgmma_gflop, launch.mma_gflop = float(found[1]), float(found[2])
            launch.ex2 = int(found[3])
        elif launch and (found := GLOBAL.search(line)):
            load, store, tma_load, tma_store, asynchronous = (int(n) for n in found.groups())
            launch.load_bytes = load + tma_load + asynchronous
            launch.store_bytes = store + tma_store
        elif launch and (found := SHARED.search(line)):
            launch.wavefronts = int(found[1]) + int(found[2])
            if call != SETUP:
                yield launch
            launch = None


SUMMED = (
    *("launches", "instructions", "wgmma_gflop", "mma_gflop", "ex2"),
    *("load_bytes", "store_bytes", "wavefronts"),
)


def _merged(launches: Iterator[Launch]) -> list[Launch]:
    """One line for the launches of the same kernel by the same call: counts added."""
    found: dict[tuple[str, str], Launch] = {}
    for launch in launches:
        first = found.setdefault((launch.call, launch.kernel), launch)
        if first is not launch:
            for name in SUMMED:
                setattr(first, name, getattr(first, name) + getattr(launch, name))
    return list(found.values())


def resources(core: Path) -> dict[str, tuple[int, int]]:
    """Demangled kernel name -> (registers, stack bytes) of its code for sm_90a."""
    tool = shutil.which("cuobjdump") or _wheel_tool("cuobjdump")
    if tool is None:
        return {}
    command = [tool, "--dump-resource-usage", "-arch", "sm_90a", str(core)]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+)"
    return {demangled(name): (int(r), int(s)) for name, r, s in re.findall(pattern, text)}


def _usage_of(kernel: str, usage: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """By name; the emulator cuts long ones short, so of all that begin so the costliest."""
    if not kernel.endswith("..."):
        return usage.get(kernel, (0, 0))
    begin = kernel.removesuffix("...")
    return max((u for name, u in usage.items() if name.startswith(begin)), default=(0, 0))


def _wheel_tool(name: str) -> str | None:
    for directory in map(Path, sys.path):
        tool = directory / "nvidia" / "cu13" / "bin" / name
        if tool.exists():
            return str(tool)
    return None


def demangled(name: str) -> str:
    """The C++ name, by the C++ runtime itself."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    demangle = runtime.__getattr__("__cxa_demangle")
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not pointer:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return text


def short_name(kernel: str) -> str:
    """`rope_kernel<bf16, 8>` of `void vlmkernels::rope_kernel<__nv_bfloat16, 8>(...)`."""
    name = kernel.split("(")[0].removeprefix("void ").replace("vlmkernels::", "")
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def occupancy(launch: Launch, gpu: Gpu) -> float:
    """Share of an SM's warps that are resident, by registers, shared memory, warps and blocks."""
    warps = -(-launch.threads // 32)
    limits = [gpu.blocks, gpu.warps // warps]
    per_warp = -(-launch.registers * 32 // 256) * 256  # allocated in units of 256
    if per_warp:
        limits.append(gpu.registers // (per_warp * warps))
    limits.append(gpu.shared_bytes // (launch.static_smem + launch.dynamic_smem + 1024))
    return min(limits) * warps / gpu.warps


def floor(launch: Launch, gpu: Gpu) -> tuple[float, str]:
    """(microseconds, unit): what the busiest unit needs at its full rate on all SMs."""
    clocks = {
        "tensor core": launch.wgmma_gflop * 1e9 / gpu.wgmma_flops
        + launch.mma_gflop * 1e9 / gpu.mma_flops,
        "exp2": launch.ex2 / gpu.ex2,
        "issue": launch.instructions / gpu.issues,
        "L1": (launch.load_bytes + launch.store_bytes) / gpu.l1_bytes,
        "L2 writes": launch.store_bytes / gpu.l2_bytes,  # what is read from L2, nobody counted
        "shared memory": launch.wavefronts / gpu.shared_wavefronts,
    }
    unit = max(clocks, key=lambda name: clocks[name])
    return clocks[unit] / gpu.sms / gpu.clock_ghz / 1e3, unit


HEAD = (
    *("call", "kernel", "launches", "threads", "regs", "smem", "stack", "occupancy", "warp inst."),
    *("mma GFLOP", "exp2", "read MB", "written MB", "floor us", "bound by"),
)


def cells(row: dict[str, Any]) -> list[str]:
    mma = row["wgmma_gflop"] + row["mma_gflop"]
    return [
        *(row["call"], f"`{row['kernel']}`", str(row["launches"]), str(row["threads"])),
        *(str(row["registers"] or "?"), str(row["static_smem"] + row["dynamic_smem"])),
        *(str(row["stack"]), f"{row['occupancy']:.0%}", str(row["instructions"])),
        *(f"{mma:.3g}" if mma else "", str(row["ex2"] or "")),
        *(f"{row['load_bytes'] / 1e6:.3g}", f"{row['store_bytes'] / 1e6:.3g}"),
        *(f"{row['floor_us']:.3g}", row["bound"]),
    ]


def write(path: Path, launches: list[Launch]) -> None:
    rows = [asdict(launch) for launch in launches]
    path.parent.mkdir(parents=True, exist_ok=True)
    label = "counted, not measured"
    document = {"label": label, "commit": commit(), "gpu": asdict(Gpu()), "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="calls whose name starts so; default all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--emit", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.emit:
        emit(args.ops)
        return
    launches = count(args.ops)
    view = Table(title=f"counted, not measured; floor on an {Gpu.name}")
    for column in HEAD:
        view.add_column(column, overflow="fold")
    for launch in launches:
        view.add_row(*cells(asdict(launch)))
    Console(width=None if sys.stdout.isatty() else 200).print(view)
    if args.json:
        write(args.json, launches)


if __name__ == "__main__":
    main()
