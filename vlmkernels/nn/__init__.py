"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.norm import LayerNorm, RMSNorm
from vlmkernels.nn.null import Null
from vlmkernels.nn.patch_embed import PatchEmbed2d, PatchEmbed3d
from vlmkernels.nn.qformer_attention import QFormerCrossAttention, Resampler
from vlmkernels.nn.rope import MRotaryEmbedding, RotaryEmbedding, VisionRotaryEmbedding

__all__ = [
    "LayerNorm",
    "MRotaryEmbedding",
    "MultiheadAttention",
    "Null",
    "PatchEmbed2d",
    "PatchEmbed3d",
    "QFormerCrossAttention",
    "RMSNorm",
    "Resampler",
    "RotaryEmbedding",
    "VisionRotaryEmbedding",
]
