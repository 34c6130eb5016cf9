"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.null import null

__all__ = ["null"]
