"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.attention import attention, attention_decode
from vlmkernels.ops.norm import layer_norm, rms_norm
from vlmkernels.ops.null import null
from vlmkernels.ops.patch_embed import patch_embed, patch_embed_pixels
from vlmkernels.ops.rope import mrope, rope, rope_from_tables, vision_rope

__all__ = [
    "attention",
    "attention_decode",
    "layer_norm",
    "mrope",
    "null",
    "patch_embed",
    "patch_embed_pixels",
    "rms_norm",
    "rope",
    "rope_from_tables",
    "vision_rope",
]
