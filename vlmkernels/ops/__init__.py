"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.attention import attention, attention_decode
from vlmkernels.ops.null import null

__all__ = ["attention", "attention_decode", "null"]
