"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops.attention import attention, attention_decode
from vlmkernels.ops.contrastive_loss import clip_loss, siglip_loss
from vlmkernels.ops.norm import layer_norm, rms_norm
from vlmkernels.ops.null import null
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.ops.rope import mrope, rope, rope_from_tables, vision_rope
from vlmkernels.ops.vq_lookup import vq_lookup

__all__ = [
    "attention",
    "attention_decode",
    "clip_loss",
    "layer_norm",
    "mrope",
    "null",
    "patch_embed",
    "rms_norm",
    "rope",
    "rope_from_tables",
    "siglip_loss",
    "vision_rope",
    "vq_lookup",
]
