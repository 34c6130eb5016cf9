"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.null import null
from vlmkernels.ops.patch_embed import patch_embed

__all__ = ["null", "patch_embed"]
