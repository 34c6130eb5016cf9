"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn.activation import GEGLU, GELU, GELUTanh, QuickGELU, SwiGLU, SwiGLUMLP
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.norm import LayerNorm, RMSNorm
from vlmkernels.nn.null import Null
from vlmkernels.nn.patch_embed import PatchEmbed2d, PatchEmbed3d
from vlmkernels.nn.qk_norm_rope import QKNormRotaryEmbedding
from vlmkernels.nn.rope import MRotaryEmbedding, RotaryEmbedding, VisionRotaryEmbedding

__all__ = [
    "GEGLU",
    "GELU",
    "GELUTanh",
    "LayerNorm",
    "MRotaryEmbedding",
    "MultiheadAttention",
    "Null",
    "PatchEmbed2d",
    "PatchEmbed3d",
    "QKNormRotaryEmbedding",
    "QuickGELU",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "SwiGLUMLP",
    "VisionRotaryEmbedding",
]
