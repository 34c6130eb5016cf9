"""info: every op is listed with the backend that it really takes."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import need_emulated_core
from tests.ops.test_any_input import CASES, valid_arguments
from vlmkernels import _core, info, ops
from vlmkernels.ops import _library
from vlmkernels.testing import emulate, reference_ops


def test_lists_every_op() -> None:
    assert set(info.backends()) == set(_library.ops)


def test_command() -> None:
    command = [sys.executable, "-m", "vlmkernels.info"]
    text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    assert all(name in text for name in _library.ops)
    assert torch.__version__ in text and _core.C.build_info()["compilers"] in text


def test_tiles() -> None:
    """Verbose: each tile of the attention kernels."""
    tiles = _core.C.attention_tiles()
    assert {tile["kernel"] for tile in tiles} == {"forward", "dq", "dk, dv", "dbias"}
    text = [" ".join(line.split()) for line in info.report(verbose=True).splitlines()]
    assert [t for t in tiles if " ".join(map(str, t.values())) not in text] == []
    assert "tiles" not in info.report()


def test_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """null: the backend that info names is the one that computes."""
    x = torch.ones(3)
    assert info.backends("cpu")["null"].name.startswith("C++")
    with reference_ops(), monkeypatch.context() as patch:
        assert info.backends("cpu")["null"].name == "PyTorch reference"
        patch.delattr(_core, "C")  # the core is not asked
        assert torch.equal(ops.null(x), x)


def test_emulated_backend() -> None:
    need_emulated_core()
    with emulate():
        assert {b.name for b in info.backends("cpu").values()} == {"CUDA, emulated"}


class Recorder:
    """Stands for the core and notes whether one of its functions said that it computed."""

    def __init__(self, core: Any) -> None:
        self.core, self.computed = core, False

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.core, name)

        def call(*args: Any) -> Any:
            result = function(*args)
            self.computed = self.computed or result is True
            return result

        return call


@pytest.mark.parametrize("case", CASES)
def test_the_backend_is_the_one_that_computes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every public function: C++ where info says C++, PyTorch where it says PyTorch."""
    function, arguments = valid_arguments(torch.float32, "cpu")[case]
    name = case.split()[0]
    op = {"rms_norm": "norm", "layer_norm": "norm", "mrope": "rope", "vision_rope": "rope"}
    op |= {"gelu": "activation", "quick_gelu": "activation", "vision_rope_qkv": "rope_qkv"}
    op |= {"swiglu": "gated_activation", "geglu": "gated_activation"}
    recorder = Recorder(_core.C)
    monkeypatch.setattr(_core, "C", recorder)
    function(*arguments)
    monkeypatch.undo()
    claimed = info.backends("cpu")[op.get(name, name)]
    by_cpp = "C++" in claimed.name + claimed.why and case != "patch_embed rows"  # rows are there
    assert recorder.computed == by_cpp, claimed
