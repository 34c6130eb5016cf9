"""Llama: RMSNorm, SwiGLU MLP, rotary embedding, attention."""

from vlmkernels.patch._family import Family
from vlmkernels.patch._modules import rms_norm, rope, swiglu_mlp

FAMILY = Family(
    "llama",
    swaps={
        "LlamaRMSNorm": (rms_norm,),
        "LlamaMLP": (swiglu_mlp,),
        "LlamaAttention": (rope,),
    },
    others=("LlamaRotaryEmbedding", "LlamaDecoderLayer"),
)
