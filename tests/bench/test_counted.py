"""Counted costs: the statistics are read right, and the arithmetic on them holds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bench import counted
from bench.counted import Gpu, Launch
from tests.conftest import need_emulated_core

TEXT = """\
vlmkernels counted: (setup)
ptxemu: kernel void vlmkernels::gemm_kernel<int>(P) grid (2,1,1) cluster (1,1,1) block (128,1,1) smem 0+1024: 0.1 s, 10 warp instructions (1.0 M/s)
  wgmma 0.000 GFLOP (0 warp-level), mma 0.000 GFLOP (0), ex2 0 thread ops; threads/inst 32.00
  global: ld 1 B in 1 requests (4.00 sectors/request), st 1 B in 1 requests (4.00 sectors/request), atomics 0; TMA ld 0 B, st 0 B; cp.async 0 B
  shared: ld 0 B, st 0 B, 0 wavefront requests, 0 bank conflicts; wgmma operand reads 0 B
vlmkernels counted: gemm fwd
ptxemu: kernel void vlmkernels::gemm_kernel<int>(P) grid (2,1,1) cluster (1,1,1) block (64,2,1) smem 16+1024: 0.1 s, 100 warp instructions (1.0 M/s)
  by class: mma 3
  wgmma 0.250 GFLOP (0 warp-level), mma 0.500 GFLOP (7), ex2 11 thread ops; threads/inst 32.00
  global: ld 100 B in 5 requests (4.00 sectors/request), st 20 B in 1 requests (4.00 sectors/request), atomics 0; TMA ld 3 B, st 4 B; cp.async 7 B
  shared: ld 64 B, st 64 B, 30 wavefront requests, 12 bank conflicts; wgmma operand reads 0 B
ptxemu: kernel void vlmkernels::gemm_kernel<int>(P) grid (2,1,1) cluster (1,1,1) block (64,2,1) smem 16+1024: 0.1 s, 50 warp instructions (1.0 M/s)
  wgmma 0.000 GFLOP (0 warp-level), mma 0.500 GFLOP (7), ex2 1 thread ops; threads/inst 32.00
  global: ld 0 B in 0 requests (0.00 sectors/request), st 1 B in 1 requests (4.00 sectors/request), atomics 0; TMA ld 0 B, st 0 B; cp.async 0 B
  shared: ld 0 B, st 0 B, 1 wavefront requests, 0 bank conflicts; wgmma operand reads 0 B
"""  # noqa: E501


def test_statistics_are_read_and_added_up() -> None:
    (launch,) = counted._merged(counted.parse(TEXT))
    assert launch == Launch(
        call="gemm fwd",
        kernel="void vlmkernels::gemm_kernel<int>(P)",
        grid="2x1x1",
        threads=128,
        static_smem=16,
        dynamic_smem=1024,
        instructions=150,
        launches=2,
        wgmma_gflop=0.25,
        mma_gflop=1.0,
        ex2=12,
        load_bytes=110,
        store_bytes=25,
        wavefronts=43,
    )
    assert counted.short_name(launch.kernel) == "gemm_kernel<int>"


def launch(threads: int, registers: int, smem: int = 0, **counts: float) -> Launch:
    fields = {"call": "c", "kernel": "k", "grid": "1x1x1", "threads": threads, "static_smem": 0}
    fields |= {"dynamic_smem": smem, "instructions": 0, "registers": registers, **counts}
    return Launch(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "expected"),
    [
        (256, 32, 0, 1.0),
        (256, 64, 0, 0.5),
        (384, 168, 0, 12 / 64),  # one block: 2 x 12 warps x 168 x 32 would be too many registers
        (128, 128, 100 * 1024, 8 / 64),  # two blocks of shared memory
        (32, 16, 0, 0.5),  # 32 blocks at most
        (1024, 65, 0, 0.0),  # 72 registers a thread after rounding: no block fits
    ],
)
def test_occupancy(threads: int, registers: int, smem: int, expected: float) -> None:
    assert counted.occupancy(launch(threads, registers, smem), Gpu()) == expected


def test_floor_is_of_the_busiest_unit() -> None:
    gpu = Gpu()
    product = launch(128, 32, wgmma_gflop=gpu.sms * gpu.wgmma_flops * gpu.clock_ghz)
    assert counted.floor(product, gpu) == (pytest.approx(1e6), "tensor core")  # one second
    softmax = launch(128, 32, wgmma_gflop=1e-3, ex2=10**6, instructions=1000)
    us = 10**6 / 16 / gpu.sms / gpu.clock_ghz / 1e3
    assert counted.floor(softmax, gpu) == (pytest.approx(us), "exp2")


def test_names_are_demangled() -> None:
    assert counted.demangled("_ZN10vlmkernels12probe_kernelEv") == "vlmkernels::probe_kernel()"
    assert counted.demangled("plain") == "plain"


@pytest.fixture
def emulated_core() -> Path:
    need_emulated_core()
    return Path(importlib.import_module("vlmkernels._C_emulated").__file__ or "")


def test_what_the_compiler_used_is_read_for_every_kernel(emulated_core: Path) -> None:
    usage = counted.resources(emulated_core)
    named = {counted.short_name(name).split("<")[0] for name in usage}
    assert {"null_kernel", "attention_fwd_kernel", "rope_kernel", "norm_kernel"} <= named
    assert all(0 < registers <= 255 for registers, _ in usage.values())


@pytest.mark.usefixtures("emulated_core")
def test_a_kernel_is_counted() -> None:
    """null copies 1 MiB: it must read and write exactly that, without a stack."""
    (null,) = counted.count(["null"])
    assert null.kernel == "null_kernel" and null.launches == 1
    assert null.load_bytes == null.store_bytes == 1 << 20
    assert 0 < null.registers <= 255 and null.stack == 0 and 0 < null.occupancy <= 1
    assert null.floor_us > 0


def test_json(tmp_path: Path) -> None:
    counted.write(tmp_path / "c.json", [launch(128, 32)])
    text = (tmp_path / "c.json").read_text()
    assert "counted, not measured" in text and Gpu.name in text


def test_names_that_the_emulator_cut_short_are_found() -> None:
    usage = {"void f<int>(P)": (10, 0), "void f<int, 4>(P)": (12, 8), "void g(P)": (99, 0)}
    assert counted._usage_of("void f<int>(P)", usage) == (10, 0)
    assert counted._usage_of("void f<int...", usage) == (12, 8)
    assert counted._usage_of("void h<...", usage) == counted._usage_of("void h(P)", usage) == (0, 0)
