"""Qwen2-VL: norms, QuickGELU and SwiGLU, M-RoPE and that of patches, patches, attention; all
images in one call."""

from vlmkernels.patch._family import Family
from vlmkernels.patch._modules import packed_attention, rms_norm, rope, swiglu_mlp, vision_rope

FAMILY = Family(
    "qwen2_vl",
    swaps={
        "Qwen2VLRMSNorm": (rms_norm,),
        "Qwen2MLP": (swiglu_mlp,),
        "Qwen2VLAttention": (rope,),
        "VisionAttention": (vision_rope, packed_attention),
    },
    others=(
        *("PatchEmbed", "PatchMerger", "VisionMlp", "Qwen2VLVisionBlock", "Qwen2VLDecoderLayer"),
        *("Qwen2VLRotaryEmbedding", "Qwen2VLVisionRotaryEmbedding"),
    ),
)
