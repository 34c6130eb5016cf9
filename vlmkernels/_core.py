"""The compiled core: which binary the ops call, and what it was built with.

`C` is `vlmkernels._C`, or `vlmkernels._C_emulated` while emulating: the same CUDA objects linked to
an emulated CUDA runtime, so that CPU tensors run through the CUDA kernels. `VLMKERNELS_EMULATE=1`
emulates from the start; `emulate()` does for a while.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch

C: Any
"""The active core. Read it as `_core.C` at each call: it changes under `emulate()`."""
emulating = os.environ.get("VLMKERNELS_EMULATE") == "1"
"""Whether it sends CPU tensors to the CUDA kernels; changes likewise."""


def _load(name: str) -> Any:
    module = importlib.import_module(f"vlmkernels.{name}")
    module.register_tensor_types(torch.Tensor, torch.nn.Parameter)
    return module


def has_emulated_core() -> bool:
    """True when this build has the core that is linked to an emulated CUDA runtime."""
    try:
        return bool(_load("_C_emulated").build_info()["emulated"])
    except ImportError:
        return False


@contextlib.contextmanager
def emulate() -> Iterator[None]:
    """Within the context, CPU tensors run through the CUDA kernels on the emulated CUDA runtime."""
    global C, emulating
    before = C, emulating
    C, emulating = _load_emulated(), True
    try:
        yield
    finally:
        C, emulating = before


def _load_emulated() -> Any:
    try:
        return _load("_C_emulated")
    except ImportError as error:
        raise RuntimeError(
            "this build has no emulated core (build it with `make emulated`)"
        ) from error


C = _load_emulated() if emulating else _load("_C")
