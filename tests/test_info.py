"""info: every op is listed with the backend that it really takes."""

import subprocess
import sys

import pytest
import torch

from vlmkernels import _core, info, ops
from vlmkernels.ops import _library
from vlmkernels.testing import emulate, has_emulated_core, reference_ops


def test_lists_every_op() -> None:
    assert set(info.backends()) == set(_library.ops)


def test_command() -> None:
    command = [sys.executable, "-m", "vlmkernels.info"]
    text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    assert all(name in text for name in _library.ops)
    assert torch.__version__ in text and _core.C.build_info()["compilers"] in text


def test_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """null: the backend that info names is the one that computes."""
    x = torch.ones(3)
    assert info.backends("cpu")["null"].name.startswith("C++")
    with reference_ops(), monkeypatch.context() as patch:
        assert info.backends("cpu")["null"].name == "PyTorch reference"
        patch.delattr(_core, "C")  # the core is not asked
        assert torch.equal(ops.null(x), x)


def test_emulated_backend() -> None:
    if not has_emulated_core():
        pytest.skip("no emulated core in this build (make emulated)")
    with emulate():
        assert {b.name for b in info.backends("cpu").values()} == {"CUDA, emulated"}
