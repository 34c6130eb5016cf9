"""The ops: functions of tensors, forward and backward. One file is one room."""

from vlmkernels.ops._attention_append import kv_cache_append
from vlmkernels.ops._attention_decode import attention_decode
from vlmkernels.ops._attention_partial import attention_partial, attention_partial_backward
from vlmkernels.ops.activation import geglu, gelu, quick_gelu, swiglu
from vlmkernels.ops.attention import attention
from vlmkernels.ops.contrastive_loss import clip_loss, siglip_loss
from vlmkernels.ops.norm import layer_norm, rms_norm
from vlmkernels.ops.null import null
from vlmkernels.ops.patch_embed import patch_embed, patch_embed_pixels
from vlmkernels.ops.qformer_attention import qformer_attention
from vlmkernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_from_tables
from vlmkernels.ops.rope import mrope, rope, rope_from_tables, vision_rope, vision_rope_qkv
from vlmkernels.ops.vq_lookup import vq_lookup

__all__ = [
    "attention",
    "attention_decode",
    "attention_partial",
    "attention_partial_backward",
    "clip_loss",
    "geglu",
    "gelu",
    "kv_cache_append",
    "layer_norm",
    "mrope",
    "null",
    "patch_embed",
    "patch_embed_pixels",
    "qformer_attention",
    "qk_norm_rope",
    "qk_norm_rope_from_tables",
    "quick_gelu",
    "rms_norm",
    "rope",
    "rope_from_tables",
    "siglip_loss",
    "swiglu",
    "vision_rope",
    "vision_rope_qkv",
    "vq_lookup",
]
