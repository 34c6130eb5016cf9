"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.norm import layer_norm, rms_norm
from vlmkernels.ops.null import null
from vlmkernels.ops.rope import mrope, rope, rope_from_tables, vision_rope

__all__ = ["layer_norm", "mrope", "null", "rms_norm", "rope", "rope_from_tables", "vision_rope"]
