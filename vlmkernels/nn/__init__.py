"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn._vector_quantize import ResidualVQ, VectorQuantize
from vlmkernels.nn.activation import GEGLU, GELU, GELUTanh, QuickGELU, SwiGLU, SwiGLUMLP
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.contrastive_loss import ClipLoss, SigLipLoss
from vlmkernels.nn.norm import LayerNorm, RMSNorm
from vlmkernels.nn.null import Null
from vlmkernels.nn.patch_embed import PatchEmbed2d, PatchEmbed3d
from vlmkernels.nn.qformer_attention import QFormerCrossAttention, Resampler
from vlmkernels.nn.qk_norm_rope import QKNormRotaryEmbedding
from vlmkernels.nn.rope import MRotaryEmbedding, RotaryEmbedding, VisionRotaryEmbedding
from vlmkernels.nn.vq_lookup import VectorQuantizer

__all__ = [
    "GEGLU",
    "GELU",
    "ClipLoss",
    "GELUTanh",
    "LayerNorm",
    "MRotaryEmbedding",
    "MultiheadAttention",
    "Null",
    "PatchEmbed2d",
    "PatchEmbed3d",
    "QFormerCrossAttention",
    "QKNormRotaryEmbedding",
    "QuickGELU",
    "RMSNorm",
    "Resampler",
    "ResidualVQ",
    "RotaryEmbedding",
    "SigLipLoss",
    "SwiGLU",
    "SwiGLUMLP",
    "VectorQuantize",
    "VectorQuantizer",
    "VisionRotaryEmbedding",
]
