"""Tools for testing and timing ops: the error rule, emulation, references, timers."""

from vlmkernels._core import emulate, has_emulated_core
from vlmkernels.ops._library import reference_ops
from vlmkernels.testing.compare import assert_as_accurate, max_error

__all__ = ["assert_as_accurate", "emulate", "has_emulated_core", "max_error", "reference_ops"]
