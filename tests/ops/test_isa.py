"""Every instruction set: all CPU kernels but attention's, which have their own such test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Widths with and without tails of every vector; each result as accurate as PyTorch's.
CHECKS = """
import sys, torch
from tests.conftest import Backend
from tests.ops import (
    test_activation, test_contrastive_loss, test_norm, test_qk_norm_rope, test_rope,
)
from vlmkernels import _core, ops

print(_core.C.build_info()["cpu"])
torch.manual_seed(0)
dtypes = (torch.float32, torch.bfloat16, torch.float16)
cpu = Backend("cpu", "cpu", dtypes)
for dtype in dtypes:
    for name in test_norm.NORMS:
        for shape in ((4, 8), (3, 72), (2, 100), (5, 1280)):
            test_norm.check(name, test_norm.inputs(shape, cpu, dtype, dtype))
    for head_dim in (6, 64, 72, 88):
        q, k = test_rope.heads(5, 3, head_dim, backend=cpu, dtype=dtype)
        for name, rotate in test_rope.all_rotations((5,), head_dim, cpu).items():
            test_rope.check(rotate, q, k, f"{name} {head_dim} {dtype}")
        inputs = [q, k, *test_qk_norm_rope.weights(head_dim, cpu, dtype)]
        for name, function in test_qk_norm_rope.variants((5,), head_dim, cpu).items():
            test_qk_norm_rope.check(function, inputs, f"{name} {head_dim} {dtype}")
    for name in (*test_activation.PLAIN, *test_activation.GATED):
        for shape in ((1, 8), (3, 71), (2, 2056)):
            x = [test_activation.values(shape, cpu, dtype) for _ in range(2)]
            test_activation.check(name, x[: 1 + (name in test_activation.GATED)])
    for size in (0, 1, 15, 16, 33, 1000):
        x = torch.randn(size + 1).to(dtype)[1:]
        assert torch.equal(ops.null(x), x)
for kind in test_contrastive_loss.PAIRS:
    for size in test_contrastive_loss.SIZES:
        test_contrastive_loss.test_accurate(cpu, kind, size)
    test_contrastive_loss.test_safe(cpu, kind, 3000.0)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECKS],
        env={**os.environ, "VLMKERNELS_ISA": isa, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    if (best := run.stdout.splitlines()[0]) != isa:
        pytest.skip(f"this machine has no {isa}: ran on {best}")
