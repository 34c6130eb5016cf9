"""Qwen2.5-VL configuration: reads and writes the published config.json (arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import INDICES, expect_fields
from vlmkernels.models.qwen2_vl.config import PRESETS as QWEN2_VL
from vlmkernels.models.qwen2_vl.config import Qwen2VLConfig, VisionFields

# Published sizes (hub config.json files): name -> fields that differ from the defaults below.
# 7B and 72B have the language models of Qwen2-VL.
PRESETS: dict[str, Json] = {
    "3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": QWEN2_VL["7B"],
    "32B": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vision": {"intermediate_size": 3456},
    },
    "72B": QWEN2_VL["72B"] | {"vision": {"intermediate_size": 3456}},
}


@dataclass
class Qwen25VLVisionConfig(VisionFields):
    """The vision tower: `depth` blocks of width `hidden_size`, merged to `out_hidden_size`.

    Attention sees windows of window_size x window_size pixels, but in the layers
    fullatt_block_indexes, where it sees the whole frame.
    """

    depth: int = 32
    hidden_size: int = 1280
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: Sequence[int] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    out_field = "out_hidden_size"

    def __post_init__(self) -> None:
        expect_fields(self, "vision_config.", fullatt_block_indexes=INDICES)
        self.fullatt_block_indexes = tuple(self.fullatt_block_indexes)
        self.check()
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size < unit:
            raise ValueError(
                f"vision_config.window_size: expected at least {unit}, got {self.window_size}"
            )

    @property
    def embed_dim(self) -> int:
        return self.hidden_size

    @property
    def window_edge(self) -> int:
        """Merged patches along an edge of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass
class Qwen25VLConfig(Qwen2VLConfig):
    """The whole model; the language model is that of Qwen2-VL."""

    max_position_embeddings: int = 128000
    vision: Any = field(default_factory=Qwen25VLVisionConfig)

    model_type: ClassVar[str] = "qwen2_5_vl"
    architecture: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"
    presets: ClassVar[dict[str, Json]] = PRESETS
    vision_class: ClassVar[Any] = Qwen25VLVisionConfig
