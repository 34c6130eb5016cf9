"""CLIP: LayerNorm, QuickGELU or GELU, patches, attention."""

from vlmkernels.patch._family import Family

FAMILY = Family(
    "clip",
    others=(
        *("CLIPAttention", "CLIPMLP", "CLIPEncoderLayer", "CLIPEncoder"),
        *("CLIPVisionEmbeddings", "CLIPTextEmbeddings"),
    ),
)
