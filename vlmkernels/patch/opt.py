"""OPT, as BLIP-2 holds it: LayerNorm, attention. Its ReLU stays."""

from vlmkernels.patch._family import Family

FAMILY = Family(
    "opt",
    others=("OPTLearnedPositionalEmbedding", "OPTAttention", "OPTDecoderLayer"),
)
