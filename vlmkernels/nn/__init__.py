"""Drop-in modules: parameters and a call, with the state_dict keys of what they replace."""

from vlmkernels.nn._vector_quantize import ResidualVQ, VectorQuantize
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.contrastive_loss import ClipLoss, SigLipLoss
from vlmkernels.nn.norm import LayerNorm, RMSNorm
from vlmkernels.nn.null import Null
from vlmkernels.nn.patch_embed import PatchEmbed2d, PatchEmbed3d
from vlmkernels.nn.rope import MRotaryEmbedding, RotaryEmbedding, VisionRotaryEmbedding
from vlmkernels.nn.vq_lookup import VectorQuantizer

__all__ = [
    "ClipLoss",
    "LayerNorm",
    "MRotaryEmbedding",
    "MultiheadAttention",
    "Null",
    "PatchEmbed2d",
    "PatchEmbed3d",
    "RMSNorm",
    "ResidualVQ",
    "RotaryEmbedding",
    "SigLipLoss",
    "VectorQuantize",
    "VectorQuantizer",
    "VisionRotaryEmbedding",
]
