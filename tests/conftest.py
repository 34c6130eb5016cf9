"""Fixtures of all tests. `backend` runs an op test in each way that an op can run here."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from vlmkernels.testing import emulate, has_emulated_core

EMULATION_REQUIRED = os.environ.get("CI") == "true"


def need_emulated_core() -> None:
    """Skips where this build has no emulated core; in CI that is a failure."""
    if has_emulated_core():
        return
    if EMULATION_REQUIRED:
        pytest.fail("CI must emulate the CUDA kernels, but this build has no emulated core")
    pytest.skip("no emulated core in this build (make emulated)")


@dataclass(frozen=True)
class Backend:
    """Where a test's tensors live, and how large they may be."""

    name: str  # "cpu" | "emulated" | "cuda"
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def small(self) -> bool:
        """True when every warp instruction is interpreted: keep shapes small."""
        return self.name == "emulated"


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    half = (torch.bfloat16, torch.float16)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield Backend("cuda", "cuda", half)
    elif request.param == "cpu":
        yield Backend("cpu", "cpu", (torch.float32, *half))
    else:
        need_emulated_core()
        with emulate():
            yield Backend("emulated", "cpu", half)


@pytest.fixture(params=["emulated", "cuda"])
def hopper(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """As `backend`, where the kernels of Hopper run."""
    half = (torch.bfloat16, torch.float16)
    if request.param == "cuda":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no Hopper GPU")
        yield Backend("cuda", "cuda", half)
    else:
        need_emulated_core()
        with emulate():
            yield Backend("emulated", "cpu", half)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed")
    count = sum("[emulated" in r.nodeid or "-emulated" in r.nodeid for r in reports)
    terminalreporter.write_line(f"emulated CUDA tests passed: {count}")
