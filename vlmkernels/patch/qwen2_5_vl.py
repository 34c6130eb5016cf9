"""Qwen2.5-VL: norms, SwiGLU, M-RoPE and that of patches, patches, attention; all windows in one
call."""

from vlmkernels.patch._family import Family
from vlmkernels.patch._modules import packed_attention, rms_norm, rope, swiglu_mlp, vision_rope

FAMILY = Family(
    "qwen2_5_vl",
    swaps={
        "Qwen2_5_VLRMSNorm": (rms_norm,),
        "Qwen2_5_VLMLP": (swiglu_mlp,),
        "Qwen2MLP": (swiglu_mlp,),
        "Qwen2_5_VLAttention": (rope,),
        "Qwen2_5_VLVisionAttention": (vision_rope, packed_attention),
    },
    others=(
        *("Qwen2_5_VisionPatchEmbed", "Qwen2_5_VLPatchMerger", "Qwen2_5_VLVisionBlock"),
        *("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLRotaryEmbedding"),
        "Qwen2_5_VLVisionRotaryEmbedding",
    ),
)
