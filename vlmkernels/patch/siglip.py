"""SigLIP: LayerNorm, tanh GELU, patches, attention (that of the pooling head is torch's own)."""

from vlmkernels.patch._family import Family

FAMILY = Family(
    "siglip",
    others=(
        *("SiglipAttention", "SiglipMLP", "SiglipEncoderLayer", "SiglipEncoder"),
        *("SiglipVisionEmbeddings", "SiglipTextEmbeddings", "SiglipMultiheadAttentionPoolingHead"),
    ),
)
