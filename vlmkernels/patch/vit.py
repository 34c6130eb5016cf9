"""ViT: LayerNorm, GELU, patches, attention."""

from vlmkernels.patch._family import Family

FAMILY = Family(
    "vit",
    others=(
        *("ViTAttention", "ViTMLP", "ViTLayer", "ViTPooler"),
        *("ViTEmbeddings", "ViTPatchEmbeddings"),
    ),
)
