"""LLaVA-1.5: GELU of the projector; its towers are families of their own."""

from vlmkernels.patch._family import Family

FAMILY = Family("llava", others=("LlavaMultiModalProjector",))
