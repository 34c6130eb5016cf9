"""Qwen2: RMSNorm, SwiGLU MLP, rotary embedding, attention."""

from vlmkernels.patch._family import Family
from vlmkernels.patch._modules import rms_norm, rope, swiglu_mlp

FAMILY = Family(
    "qwen2",
    swaps={
        "Qwen2RMSNorm": (rms_norm,),
        "Qwen2MLP": (swiglu_mlp,),
        "Qwen2Attention": (rope,),
    },
    others=("Qwen2RotaryEmbedding", "Qwen2DecoderLayer"),
)
